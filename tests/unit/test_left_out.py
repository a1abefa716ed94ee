"""What libraries would take along where it is installed is left out of a worker, and is there for who asks for it later."""

import sys
from pathlib import Path

import pytest

from raytune.missing import left_out


def test_a_module_is_not_found_in_the_block_and_is_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken_along.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with left_out("taken_along", "is_nowhere"), pytest.raises(ImportError):
        import taken_along  # pyright: ignore[reportMissingImports]
    import taken_along  # noqa: F401  # pyright: ignore[reportMissingImports]

    assert "is_nowhere" not in sys.modules
    with left_out("taken_along"):
        assert sys.modules["taken_along"] is not None, "who has it keeps it"
    del sys.modules["taken_along"]
