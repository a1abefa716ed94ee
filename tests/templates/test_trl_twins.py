"""Masks on real templates equal those of the twins that TRL marks for training, or the row is refused with the cause.

Needs TRL's templates (the extra `test`); `python -m tests.templates.twins` prints the whole table and every reason.
"""

import pytest

from tests.templates.shapes import SHAPES
from tests.templates.twins import families, twins_folder, verdict, without_blocks
from tests.variants import variants

FOLDER = twins_folder()
NAMES = families(FOLDER) if FOLDER else []
pytestmark = pytest.mark.skipif(FOLDER is None, reason="trl is not installed")


def _texts(name: str) -> tuple[str, str]:
    assert FOLDER is not None
    original = (FOLDER / f"{name}.jinja").read_text()
    twin = FOLDER / f"{name}_training.jinja"
    return original, twin.read_text() if twin.exists() else original


def _differing(original: str, twin: str) -> list[str]:
    verdicts = {shape: verdict(original, twin, row) for shape, row in SHAPES.items()}
    return [f"{shape}: {found.why}" for shape, found in verdicts.items() if found.word == "DIFFERS"]


@pytest.mark.parametrize("name", NAMES)
def test_an_original_is_masked_as_its_twin_is_marked_or_the_row_is_refused_with_the_cause(name: str) -> None:
    assert not _differing(*_texts(name))


@pytest.mark.parametrize("name", variants(NAMES[::2], NAMES[1::2]))
def test_a_twin_without_its_markers_is_masked_as_with_them(name: str) -> None:
    _, twin = _texts(name)
    assert not _differing(without_blocks(twin), twin)


def test_the_table_has_both_kinds_of_verdicts() -> None:
    """A comparison that found nothing to compare would agree with everything."""
    words = [verdict(*_texts(name), row).word for name in ("qwen2_5", "gemma") for row in SHAPES.values()]
    assert words.count("agrees") > len(SHAPES)
    assert words.count("refused") > 3
