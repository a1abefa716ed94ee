"""The recipes in configs/recipes, but for the quickstart, which tests of their own run as it is."""

from pathlib import Path

from raytune.config.load import load_config
from raytune.config.sections.run import RunConfig

FOLDER = Path(__file__).parents[1] / "configs" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "quickstart")


def recipe(name: str) -> RunConfig:
    return load_config([FOLDER / f"{name}.yaml"])
