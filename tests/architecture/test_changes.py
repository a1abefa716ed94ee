"""The size of a change: where AGENTS.md and the guide say a new thing goes, its kind is named today, and nowhere else."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from raytune.config.words.error_pages import ERROR_PAGES
from raytune.config.words.guides import guides

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "raytune"
TASKS = "evaluation/lm_eval_tasks.py"  # has names of lm_eval's

# Names of each kind, and files where such a name stands for something else than the kind itself.
KINDS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "a data format": (("sharegpt", "alpaca", "prompt_completion"), set()),
    "a chat template": (("chatml", "llama-2", "llama-3"), set()),
    "a validation metric": (("bits_per_byte",), {TASKS}),
    "a fine-tuning method": (("ia3", "olora"), set()),
    "a metric of answers": (("exact_match",), {TASKS}),
    "an error of a config": (("E101", "E112"), set()),
    "a verb": (("doctor",), set()),
    "a figure of a sweep": (("parallel_coordinates", "learning_curves"), set()),
    "an optimizer": (("adafactor", "lion", "muon", "schedule_free_adamw"), set()),
    "a learning-rate schedule": (("wsd", "cosine"), set()),
    "a rule that stops trials": (("asha", "hyperband", "median"), set()),
    "a GPU, an instance or a price": (
        ("p5.48xlarge", "g6e.12xlarge", "H100"),
        {"config/sections/cluster.py"},
    ),  # an example of its field
    "a cloud": (("aws", "gcp", "azure"), {"missing.py"}),  # an extra of the package
    "a tracker": (("trackio", "mlflow"), set()),
}


@cache
def table() -> dict[str, list[str]]:
    """What is to be touched, by what is added: paths from the root of the repository."""
    rows = re.findall(r"^\| (an? .*?) \| (.*) \|$", guides()["changes"].text, re.MULTILINE)
    return {added: [path if path.startswith(("configs/", "cluster/")) else f"raytune/{path}" for path in paths_in(touched)]
            for added, touched in rows}  # fmt: skip


def paths_in(cell: str) -> list[str]:
    return [name for name in re.findall(r"`([^`]+)`", cell) if "/" in name or name.endswith(".py")]


@cache
def constants() -> dict[str, set[str]]:
    """Texts that stand in the code, by the file of the package."""
    return {
        str(path.relative_to(PACKAGE)): {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        for path in PACKAGE.rglob("*.py")
    }


def test_the_table_is_the_same_in_both_places() -> None:
    text = guides()["changes"].text
    rows = text[text.index("| to add |") : text.index("\n\n## Why")]
    assert len(table()) > 12
    assert rows in (ROOT / "AGENTS.md").read_text()


@pytest.mark.parametrize("added", table())
def test_what_a_change_touches_exists(added: str) -> None:
    missing = [path for path in table()[added] if not (ROOT / path).exists()]
    assert table()[added]
    assert not missing


@pytest.mark.parametrize("added", KINDS)
def test_a_thing_of_a_kind_is_named_where_the_table_says_and_nowhere_else(added: str) -> None:
    names, others = KINDS[added]
    allowed = (*(path.removeprefix("raytune/") for path in table()[added]), *others)
    found = {file for file, texts in constants().items() if texts.intersection(names)}
    assert not [file for file in found if not file.startswith(allowed)]


@pytest.mark.parametrize("added", KINDS)
def test_each_name_of_a_kind_is_one_today(added: str) -> None:
    names, _ = KINDS[added]
    places = [PACKAGE.parent / path for path in table()[added]]
    files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file()]
    gone = [name for name in names if not any(name in file.name or name in file.read_text() for file in files)]
    assert not gone


def test_guides_have_names_of_their_own_and_cite_files_that_exist() -> None:
    from raytune.config.reading.keys import keys

    assert {"facts", "faults", "performance", "changes"} <= set(guides())
    assert not set(guides()) & ({path.rpartition(".")[2] for path in keys()} | {id.lower() for id in ERROR_PAGES} | {"guides"})
    cited = {
        (guide.name, path)
        for guide in guides().values()
        for path in re.findall(r"`((?:raytune|tests|configs|cluster|[a-z]+)/[\w./-]+\.(?:py|yaml|md))`", guide.text)
    }
    assert len(cited) > 20
    assert not [(name, path) for name, path in cited if not (ROOT / path).exists() and not (PACKAGE / path).exists()]


def test_comments_cite_only_what_is_in_the_repository() -> None:
    """Notes that lie elsewhere are no source for who reads the code; the guides are."""
    here = {path.name for path in (*ROOT.glob("*.md"), *(PACKAGE / "docs").glob("*.md"))}
    files = [path for folder in ("raytune", "tests", "configs", "cluster") for path in (ROOT / folder).rglob("*")]
    texts = {path: path.read_text() for path in files if path.suffix in (".py", ".yaml", ".j2") or path.name in here}
    cited = {
        (str(path.relative_to(ROOT)), name) for path, text in texts.items() for name in re.findall(r"\b[A-Z_]{2,}\.md\b", text)
    }
    assert {("tests/architecture/test_changes.py", "AGENTS.md")} <= cited
    assert not [(path, name) for path, name in cited if name not in here]
