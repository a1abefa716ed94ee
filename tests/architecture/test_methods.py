"""A method is one row: nobody else asks of which class an adapter section is, and what a new one touches is counted."""

import ast
from pathlib import Path

from raytune.config.reading.keys import choices, keys
from raytune.model.adapters import ADAPTERS
from raytune.plan.methods import METHODS

PACKAGE = Path(__file__).parents[2] / "raytune"
HOMES = ("config/sections/adapter.py", "plan/methods/", "model/adapters/")


def adapter_classes() -> set[str]:
    """Names of the sections in the union."""
    tree = ast.parse((PACKAGE / "config" / "sections" / "adapter.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Adapter")}


def class_tests(path: Path, names: set[str]) -> list[int]:
    """Lines that ask whether something is of one of these classes: by `isinstance`, `type(...)` or a `match` case."""
    tree = ast.parse(path.read_text())
    lines = []
    for node in (each for each in ast.walk(tree) if isinstance(each, ast.expr | ast.pattern)):
        asks = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass")
        compares_type = isinstance(node, ast.Compare) and any(
            isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "type"
            for part in (node.left, *node.comparators)
        )
        if asks or compares_type or isinstance(node, ast.MatchClass):
            mentioned = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            lines += [node.lineno] if mentioned & names else []
    return lines


def test_only_the_homes_of_methods_ask_of_which_class_a_section_is() -> None:
    names = adapter_classes()
    assert {"FullAdapter", "LoraAdapter", "QloraAdapter"} <= names
    asking = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if (lines := class_tests(path, names)) and not str(path.relative_to(PACKAGE)).startswith(HOMES)
    }
    assert not asking


def test_the_count_sees_each_way_to_ask(tmp_path: Path) -> None:
    asks = [
        "isinstance(x, LoraAdapter)",
        "isinstance(x, (A, FullAdapter))",
        "type(x) is QloraAdapter",
        "issubclass(t, LoraAdapter)",
    ]
    source = "\n".join([*asks, "match x:\n    case LoraAdapter(): pass", "LoraAdapter()"])
    (tmp_path / "a.py").write_text(source)
    assert len(class_tests(tmp_path / "a.py", adapter_classes())) == 5


def test_every_method_of_the_union_has_its_row_in_both_tables() -> None:
    methods = set(choices(keys()["adapter.method"].annotation))
    assert set(METHODS) == methods
    assert set(ADAPTERS) == methods - {"qlora"}, "a preset is apart before a model is made"


def test_a_method_is_known_in_its_homes_and_by_lines_of_tables_only() -> None:
    """What a change touches: (IA)^3 is the example. `run.schema.json` is generated."""
    tables = {"config/checks/readers.py": 1, "config/words/foreign_names.yaml": 5}
    files = (path for ending in ("py", "yaml", "j2") for path in PACKAGE.rglob(f"*.{ending}"))
    mentions = {
        str(path.relative_to(PACKAGE)): sum("ia3" in line.lower() for line in path.read_text().splitlines()) for path in files
    }
    outside = {name: count for name, count in mentions.items() if count and not name.startswith(HOMES)}
    assert outside.keys() <= tables.keys()
    assert all(count <= tables[name] for name, count in outside.items())
    homes = {name for name, count in mentions.items() if count and name.startswith(HOMES)}
    assert homes == {
        "config/sections/adapter.py",
        "plan/methods/__init__.py",
        "plan/methods/ia3.py",
        "model/adapters/__init__.py",
        "model/adapters/ia3.py",
    }
