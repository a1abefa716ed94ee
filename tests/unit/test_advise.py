"""Claims about `advise`: every method is planned as alone, what does not fit is named with the way out, and nothing is read."""

import json
from dataclasses import replace

from click.testing import CliRunner

from raytune.cli import cli
from raytune.config.load import config_from
from raytune.launch.cluster import this_machine
from raytune.plan.advise import advise
from raytune.plan.ahead import plan_ahead
from raytune.plan.describe import advice_text
from raytune.plan.methods import METHODS

JOB = {"model": {"base": "Qwen/Qwen3-8B"}, "data": {"train": "rows.jsonl"}, "cluster": {"instance": "p5.48xlarge"}}
TOKENS = 50_000_000


def test_every_method_is_planned_as_it_would_be_alone():
    config = config_from(JOB)
    advised = {one.method: one.plan for one in advise(config, this_machine(config.cluster), TOKENS).methods}
    alone = {method: plan_ahead(config_from(JOB | {"adapter": {"method": method}}), TOKENS) for method in METHODS}
    assert advised == alone


def test_the_adapter_section_counts_for_every_method_that_has_its_keys():
    config = config_from(JOB | {"adapter": {"method": "lora", "rank": 64}})
    advised = {one.method: one.plan for one in advise(config, this_machine(config.cluster), TOKENS).methods}
    ranks = {method: plan and plan.adapter.model_dump().get("rank") for method, plan in advised.items()}
    assert (ranks["lora"], ranks["qlora"], ranks["ia3"]) == (64, 64, None)


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
    assert all(one.plan and one.plan.cluster.device == "cpu" for one in advised.methods)
    cramped = advise(config, replace(here, host_memory_bytes=2**29), 1_000_000)
    assert all(one.refusal for one in cramped.methods)


def test_the_verb_takes_options_for_keys_and_answers_in_json():
    words = ["advise", "--model", "Qwen/Qwen3-8B", "--instance", "p5.48xlarge", "--tokens", "50M"]
    shown, said = CliRunner().invoke(cli, words), CliRunner().invoke(cli, [*words, "--json"])
    assert (shown.exit_code, said.exit_code) == (0, 0)
    facts = json.loads(said.stdout)
    assert [one["method"] for one in facts["methods"]] == list(METHODS)
    assert facts["assumption"] in shown.stdout
    assert all(one["when"] in shown.stdout for one in facts["methods"])
