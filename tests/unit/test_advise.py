"""Claims about `advise`: every method is planned as alone, what does not fit is named with the way out, and nothing is read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import raytune
from raytune.cli import cli
from raytune.config.load import config_from
from raytune.config.problems import ConfigError
from raytune.errors import ModelError, UserError
from raytune.launch.cluster.host import this_machine
from raytune.plan.advise import advise
from raytune.plan.ahead import plan_ahead
from raytune.plan.describe import advice_text
from raytune.plan.methods import METHODS

JOB = {"model": {"base": "Qwen/Qwen3-8B"}, "data": {"train": "rows.jsonl"}, "cluster": {"instance": "p5.48xlarge"}}
TOKENS = 50_000_000
POSSIBLE = [method for method in METHODS if method != "trainable_tokens"]
"""Without tokens whose rows could be trained."""


def test_every_method_is_planned_as_it_would_be_alone():
    config = config_from(JOB)
    *advised, refused = advise(config, this_machine(config.cluster), TOKENS).methods
    alone = {method: plan_ahead(config_from(JOB | {"adapter": {"method": method}}), TOKENS) for method in POSSIBLE}
    assert {one.method: one.plan for one in advised} == alone
    assert (refused.method, refused.plan) == ("trainable_tokens", None)
    assert refused.refusal is not None
    assert "Name new ones in model.new_tokens" in refused.refusal


def test_new_tokens_are_planned_with_the_methods_that_train_their_rows():
    job = JOB | {"model": JOB["model"] | {"new_tokens": [{"token": "<tool>"}]}}
    advised = {one.method: one for one in raytune.advise(job, tokens=TOKENS).methods}
    assert {method for method, one in advised.items() if one.plan} == {"full", "lora", "qlora", "trainable_tokens"}
    assert "trainable_tokens" in str(advised["ia3"].refusal)


def test_phases_are_the_way_of_full_and_no_reason_against_other_methods():
    phases = [{"last_layers": 1}, {"from_fraction": 0.5, "last_layers": "all"}]
    job = JOB | {"adapter": {"method": "full"}, "strategy": {"unfreeze": phases}}
    advised = {one.method: one.plan for one in raytune.advise(job, tokens=TOKENS).methods}
    assert {method for method, plan in advised.items() if plan} == {*POSSIBLE}
    assert [method for method, plan in advised.items() if plan and plan.optimization.phases] == ["full"]


def test_the_adapter_section_counts_for_its_method_and_its_presets_and_what_is_saved_for_all():
    job = JOB | {"adapter": {"method": "lora", "rank": 64, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}}
    advised = {one.method: one.plan for one in raytune.advise(job, tokens=TOKENS).methods}
    sections = {method: plan.adapter.model_dump() for method, plan in advised.items() if plan}
    assert [*sections] == POSSIBLE
    ranks = {method: section.get("rank") for method, section in sections.items()}
    assert ranks == dict.fromkeys(POSSIBLE) | {"lora": 64, "qlora": 64, "lokr": 16, "loha": 16, "vera": 256, "adalora": 8}
    keep = {method for method, section in sections.items() if section.get("modules_to_save") == ["lm_head"]}
    assert keep == {*POSSIBLE} - {"full", "prompt_tuning", "prefix_tuning", "p_tuning"}


def test_the_python_verb_takes_what_the_command_does_and_refuses_as_it_does(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 100)
    (tmp_path / "empty.jsonl").write_text("")
    said = raytune.advise({"model": {"base": "demo"}}, data={"train": str(tmp_path / "rows.jsonl")})
    assert [one.method for one in said.methods if one.plan] == POSSIBLE
    assert "350 tokens" in said.assumption
    with pytest.raises(UserError, match="is empty"):
        raytune.advise({"model": {"base": "demo"}}, data={"train": str(tmp_path / "empty.jsonl")})
    with pytest.raises(ConfigError, match=r"model\.base.* is missing"):
        raytune.advise({"cluster": JOB["cluster"]}, tokens=TOKENS)
    with pytest.raises(ModelError, match="neither a folder nor in the Hugging Face cache"):
        raytune.advise({"model": {"base": "nobody/nothing-7b"}}, tokens=TOKENS)


def test_what_does_not_fit_comes_last_with_the_way_out():
    config = config_from(JOB | {"model": {"base": "meta-llama/Llama-3.1-70B"}, "cluster": {"instance": "g6e.12xlarge"}})
    advised = advise(config, this_machine(config.cluster), TOKENS)
    fitting = [one.plan is not None for one in advised.methods]
    assert fitting == sorted(fitting, reverse=True)
    assert 0 < sum(fitting) < len(METHODS)
    text = advice_text(advised)
    table, _, refused = text.partition("Not possible here:")
    assert all((one.method in table) == (one.plan is not None) for one in advised.methods if one.method not in ("lora", "full"))
    assert "full: The run does not fit: a worker needs at least" in refused
    assert "What would fit: cluster.nodes=" in refused


def test_this_machine_counts_where_no_instance_is_named():
    config = config_from({"model": {"base": "demo"}, "data": {"train": "demo:train"}})
    here = this_machine(config.cluster)
    advised = advise(config, here, 1_000_000)
    assert [one.method for one in advised.methods if one.plan and one.plan.cluster.device == "cpu"] == POSSIBLE
    cramped = advise(config, replace(here, host_memory_bytes=2**29), 1_000_000)
    assert all(one.refusal for one in cramped.methods)


def test_the_verb_takes_options_for_keys_and_answers_in_json():
    words = ["advise", "--model", "Qwen/Qwen3-8B", "--instance", "p5.48xlarge", "--tokens", "50M"]
    shown, said = CliRunner().invoke(cli, words), CliRunner().invoke(cli, [*words, "--json"])
    assert (shown.exit_code, said.exit_code) == (0, 0)
    facts = json.loads(said.stdout)
    assert [one["method"] for one in facts["methods"]] == [*POSSIBLE, "trainable_tokens"]
    assert facts["assumption"] in shown.stdout
    assert all((one["when"] in shown.stdout) == (one["plan"] is not None) for one in facts["methods"])
