"""Folders that get their name once they are whole: where nobody can write, on full disks, behind links."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raytune.errors import ModelError, RaytuneError, StorageFullError, UserError
from raytune.model.files.whole_folder import refuse_taken, scratch_beside, written_whole


def test_a_folder_behind_a_link_is_written_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in ("empty", "later"):
        link = tmp_path / f"to {target}"
        link.symlink_to(tmp_path / target)
        refuse_taken(link, "it")
        with written_whole(link) as unfinished:
            (unfinished / "file").touch()
        assert link.is_symlink()
        assert [one.name for one in (tmp_path / target).iterdir()] == ["file"]


@pytest.mark.parametrize("place", ["/proc/nobody/here", "/dev/null/here", "n" * 300, "n" * 250])
def test_where_no_folder_can_be_made_it_is_said(tmp_path: Path, place: str) -> None:
    for make in (written_whole, lambda output: scratch_beside(output, "scratch")):
        with pytest.raises(UserError, match=r"Cannot (use|make the folder) .*"), make(tmp_path / place):
            raise AssertionError
    assert [*tmp_path.iterdir()] == []


def test_a_name_that_cannot_be_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="File name too long"):
        refuse_taken(tmp_path / ("n" * 300), "it")


def test_a_disk_that_fills_up_is_told_and_left_as_it_was(small_disk: Path) -> None:
    for make in (written_whole, lambda output: scratch_beside(output, "scratch")):
        with pytest.raises(StorageFullError, match=r"is full .*nothing of .* was kept"), make(small_disk / "model") as folder:
            save_file({"a": torch.zeros(2 << 20)}, folder / "weights.safetensors")
        with pytest.raises(StorageFullError, match="is full"), make(small_disk / "model") as folder:
            (folder / "file").write_bytes(bytes(8 << 20))
    assert [*small_disk.iterdir()] == []


def test_a_mounted_disk_is_no_name_for_a_folder(small_disk: Path) -> None:
    (small_disk.parent / "link").symlink_to(small_disk)
    for output in (small_disk, small_disk.parent / "link"):
        with pytest.raises(ModelError, match=r"A disk is mounted at .*Name one below it"):
            refuse_taken(output, "the model")


def test_another_error_leaves_nothing_and_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RaytuneError, match="mine"), written_whole(tmp_path / "model"):
        raise RaytuneError("mine")
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "model"):
        raise KeyboardInterrupt
    assert [*tmp_path.iterdir()] == []
