"""The house: floors import downwards only, heavy libraries have named owners, and there are no circles."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "raytune"
FLOORS = (
    ("errors", "units", "missing", "versions", "printable", "credentials", "run_folder", "token_file", "user_code"),
    ("local_files",),
    ("object_store", "hub"),
    ("storage",),
    ("metrics",),
    ("config",),
    ("importing",),
    ("plan",),
    ("data",),
    ("model",),
    ("evaluation",),
    ("training",),
    ("tracking",),
    ("launch",),
    ("sweeps",),
    ("report",),
    ("watch",),
    ("clusters",),
    ("serving",),
    ("api",),
    ("cli",),
    ("entry",),
)
"""From the ground up. A module imports its own floor or a lower one; the package's own file offers the Python API, above all."""
OWNERS = {
    "deepspeed": {
        *(f"training/engines/zero_{name}.py" for name in ("engine", "loading", "files")),
        "training/engines/node_groups.py",
    },
    "ray": {
        "training/worker.py",
        "launch/",
        "clusters/working_dir.py",
        "clusters/dashboard.py",
        "clusters/job.py",
        "clusters/job_environment.py",
        "clusters/job_progress.py",
        "clusters/jobs.py",
        "clusters/package.py",
        "clusters/preflight.py",
        "clusters/checks/",
        "sweeps/search.py",
        "sweeps/schedule.py",
        "sweeps/trainable.py",
        "sweeps/tuner.py",
        "serving/deployments.py",
        "serving/endpoint.py",
        "serving/ingress.py",
    },
    "fastapi": {"serving/front.py"},
    "prometheus_client": {"serving/counters.py"},
    "optuna": {"sweeps/search.py"},
    "bitsandbytes": {"model/parts/quantize.py", "training/engines/optimizer.py"},
    "peft": {"model/"},
    "gguf": {"model/gguf/gguf_file.py"},
    "rensa": {"data/quality/signatures.py"},
    "datasets": {"data/files/sources.py", "evaluation/lm_eval_documents.py"},
    "lm_eval": {f"evaluation/lm_eval_{name}.py" for name in ("tasks", "documents", "answers")},
    "huggingface_hub": {
        "hub/client.py",
        "hub/upload.py",
        "model/files/pretrained.py",
    },  # the latter for the errors of transformers' configs
    "httpx2": {"hub/client.py", "hub/upload.py"},
    "yaml": {"config/yaml_nodes.py"},
    "fsspec": {"object_store.py"},
    "aiohttp": {"clusters/jobs.py", "watch/server.py"},
    "click": {"cli/"},
    "rich": {
        "launch/state/progress.py",
        "launch/data/data_colours.py",
        "launch/data/live.py",
        "launch/data/reading.py",
        "launch/data/tokenising.py",
        "sweeps/final_table.py",
        "sweeps/live.py",
        "watch/screen.py",
        "watch/terminal.py",
    },
    "tensorboard": {"tracking/tensorboard.py"},
    "mlflow": {"tracking/mlflow.py"},
    "wandb": {"tracking/wandb.py"},
    "trackio": {"tracking/trackio.py"},
    "matplotlib": {"report/figures/"},
    "jinja2": {
        *(f"data/templates/{name}.py" for name in ("template", "budget", "front", "date")),
        *("clusters/provider.py", "report/page.py", "report/model_card.py"),
    },
}


def modules() -> dict[str, Path]:
    return {
        ".".join(("raytune", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }


@cache
def imported_names(path: Path) -> set[str]:
    """Every module that a file imports, lazily or not, by full name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; modules are imported by full name"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def floor(module: str) -> int:
    if module == "raytune":
        return len(FLOORS)
    return next(height for height, names in enumerate(FLOORS) if module.split(".")[1] in names)


def own_imports(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    return {name for name in imported_names(path) if name in known and name not in (module, "raytune")}


def test_every_module_has_a_floor_and_every_floor_has_its_modules() -> None:
    assert {module.split(".")[1] for module in modules() if module != "raytune"} == {name for names in FLOORS for name in names}


@pytest.mark.parametrize("place", ["AGENTS.md", "raytune/__init__.py"])
def test_who_reads_about_the_floors_reads_of_these(place: str) -> None:
    line = " < ".join(", ".join(names) for names in FLOORS)
    assert line in " ".join((ROOT / place).read_text().replace("`", "").split())


def test_modules_import_their_own_floor_or_lower() -> None:
    known = modules()
    upward = [
        f"{module} -> {name}"
        for module, path in known.items()
        for name in own_imports(module, path, known)
        if floor(name) > floor(module)
    ]
    assert not upward


def test_there_are_no_circles() -> None:
    known = modules()
    graph = {module: own_imports(module, path, known) for module, path in known.items() if path.name != "__init__.py"}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for name in graph.get(module, ()):
                visit(name, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("floor_name", [name for names in FLOORS for name in names if (PACKAGE / name).is_dir()])
def test_rooms_of_a_floor_import_one_way_in_the_order_that_its_first_page_gives(floor_name: str) -> None:
    """Files that lie in no room may import any: they are the floor's own entry, or what all rooms stand on."""
    known = modules()
    rooms = [path.name for path in (PACKAGE / floor_name).iterdir() if (path / "__init__.py").exists()]
    page = known[f"raytune.{floor_name}"].read_text()
    order = sorted(rooms, key=lambda room: page.find(f"\n    {room} "))
    assert len(rooms) < 2 or all(f"\n    {room} " in page for room in rooms)
    upward = [
        f"{module} -> {name}"
        for module, path in known.items()
        for name in own_imports(module, path, known)
        if len(module.split(".")) > 3
        and module.split(".")[1] == floor_name == name.split(".")[1]
        and name.split(".")[2] in rooms
        and order.index(name.split(".")[2]) > order.index(module.split(".")[2])
    ]
    assert not upward


@pytest.mark.parametrize("library", OWNERS)
def test_a_heavy_library_is_imported_by_its_owners_only(library: str) -> None:
    strangers = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == library for name in imported_names(path))
        and not any(str(path.relative_to(PACKAGE)).startswith(owner) for owner in OWNERS[library])
    ]
    assert not strangers


@pytest.mark.parametrize("floor_name", ["config", "plan"])
def test_config_and_plan_load_without_torch_ray_or_transformers(floor_name: str) -> None:
    names = [name for name in modules() if name.startswith(f"raytune.{floor_name}.")]
    code = f"import sys, {', '.join(names)}; print([m for m in ('torch', 'ray', 'transformers', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


MODEL_LIBRARIES = ("peft", "bitsandbytes", "deepspeed", "datasets", "transformers.modeling_utils", "torch._dynamo")


PLANNING = ("raytune.launch.planning", "raytune.launch.check", "raytune.launch.data.data_check", "raytune.sweeps.planner")


def test_drivers_load_only_what_they_need() -> None:
    """One that trains imports what one that plans does, and more; without Ray the latter starts in half the time."""
    code = ["import sys"]
    for modules, libraries in ((PLANNING, (*MODEL_LIBRARIES, "ray", "pandas")), (("raytune.launch.run",), MODEL_LIBRARIES)):
        code += [f"import {', '.join(modules)}", f"print([name for name in {libraries} if name in sys.modules])"]
    result = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.split("\n") == ["[]", "[]", ""]
