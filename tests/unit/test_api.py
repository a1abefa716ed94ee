"""What can be typed can be called: the verbs as functions of the package, also where an event loop runs, as in a notebook."""

import asyncio
import inspect
import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import raytune
from raytune.cli import cli
from raytune.errors import UserError

NAMED_OTHERWISE = {"plan": "make_plan", "report": "write_report", "import": "import_config"}
"""`raytune.plan` and `raytune.report` are floors, and `import` is a word of Python."""
AT_A_TERMINAL = {"cluster_render", "cluster_up", "cluster_down", "explain", "schema", "top", "ui"}
"""Verbs that show something, or hand on to Ray's own commands."""


def test_every_verb_is_a_function_with_words_for_each_argument() -> None:
    verbs = {
        name.replace("-", "_")
        for verb, command in cli.commands.items()
        for name in ([f"{verb}_{part}" for part in command.commands] if isinstance(command, click.Group) else [verb])
    }
    missing = {NAMED_OTHERWISE.get(verb, verb) for verb in verbs - AT_A_TERMINAL} - set(raytune.__all__)
    assert not missing
    for name in set(raytune.__all__) - {"RunEvent"}:
        function = getattr(raytune, name)
        for argument in inspect.signature(function).parameters:
            assert f"{argument}" in (function.__doc__ or ""), f"{name}: {argument}"


def test_a_plan_is_that_of_the_command_line_where_an_event_loop_runs_too(tmp_path: Path) -> None:
    few = {"path": "demo:train", "max_rows": 20}
    settings = {"storage": str(tmp_path), "training": {"max_steps": 20}, "data": {"train": few}}
    typed = ["plan", "configs/recipes/quickstart.yaml", f"storage={tmp_path}", "training.max_steps=20"]
    typed += [f"data.train={json.dumps(few)}", "--json"]

    async def called() -> str:
        return raytune.make_plan("configs/recipes/quickstart.yaml", **settings).model_dump_json()

    assert json.loads(asyncio.run(called())) == json.loads(CliRunner().invoke(cli, typed).stdout)


def test_a_plan_for_machines_that_are_not_there_needs_the_amount_of_data_alone() -> None:
    config = {"model": {"base": "demo"}, "cluster": {"instance": "p5.48xlarge", "nodes": 2}}
    assert raytune.make_plan(config, tokens=10_000_000).cost.num_nodes == 2
    with pytest.raises(UserError, match=r"set cluster\.instance"):
        raytune.make_plan({"model": {"base": "demo"}}, tokens=10_000_000)


def test_a_check_says_everything_at_once_and_looks_at_rows(tmp_path: Path) -> None:
    few = {"path": "demo:train", "max_rows": 20}
    found = raytune.check("configs/recipes/quickstart.yaml", storage=str(tmp_path), data={"train": few})
    assert "demo" in str(found)
    with pytest.raises(UserError) as refused:
        raytune.check({"data": {"train": str(tmp_path / "none.jsonl")}, "model": {"base": str(tmp_path)}})
    assert "none.jsonl" in str(refused.value)
    assert "holds no config.json" in str(refused.value)


def test_trackers_of_no_run_are_told_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder of a run"):
        raytune.track(tmp_path, tensorboard={})


def test_this_machine_is_examined_without_a_command(tmp_path: Path) -> None:
    assert {finding.status for finding in raytune.doctor(tmp_path)} <= {"ok", "warn", "fail"}
