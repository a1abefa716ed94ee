"""A file of suites: a YAML with the one key `suites`, a list as that of `evaluation.suites` in a config."""

from dataclasses import replace

from raytune.config.checks.validate import validated
from raytune.config.load import Places
from raytune.config.problems import MISSING_KEY, UNKNOWN_KEY, Place, Problem, dotted
from raytune.config.reading.files import read_file
from raytune.config.reading.overlays import places_in, stacked
from raytune.config.reading.secrets_in import secret_problems
from raytune.config.sections.evaluation import SuiteSection
from raytune.config.sections.run import RunConfig
from raytune.config.sections.user_code import with_files
from raytune.config.yaml_nodes import Node

KEY = "suites"


def read_suites(path: str) -> tuple[RunConfig, Places]:
    """The config whose `evaluation.suites` are those of a file, and where its keys were written.

    Raises:
        ConfigError: with every problem of the file.
    """
    tree, problems = read_file(path, rank=0)
    found = tree.value.get(KEY) if tree and isinstance(tree.value, dict) else None
    if tree and isinstance(tree.value, dict):
        strangers = [(name, node) for name, node in tree.value.items() if name != KEY]
        problems += [
            Problem(UNKNOWN_KEY, node.key_place, name, f"unknown key; a file of suites has one key, {KEY}")
            for name, node in strangers
        ]
    if not problems and (found is None or found.value in (None, [])):
        place = found.place if found else tree.place if tree else Place(path)
        problems.append(Problem(MISSING_KEY, place, KEY, f"names no suite; {KEY} is a list as that of evaluation.suites"))
    whole = stacked([_around(found)] if found else [])
    whole = with_files(whole)
    problems += secret_problems(whole)
    config = validated(whole, problems, check_files=True)
    return config, {dotted(key): place for key, place in places_in(whole, ())}


def suites_by_key(config: RunConfig) -> dict[str, SuiteSection]:
    """The suites of such a config by their keys, which errors name."""
    return {f"evaluation.suites.{number}": suite for number, suite in enumerate(config.evaluation.suites)}


def _around(suites: Node) -> Node:
    """A config that has nothing but these suites."""
    inner = replace(suites, value={KEY: suites})
    return replace(suites, value={"evaluation": inner})
