"""How a base is held is said in one of two sections, or in both alike; a preset and its long form are one run."""

from typing import Any

import pytest

from raytune.config.load import config_from, dump_yaml
from raytune.config.problems import ConfigError
from raytune.config.sections.quantization import held_base
from raytune.errors import UserError
from raytune.plan.describe import plan_table
from raytune.plan.identity.settings import certain_changes, changes_in_keys
from raytune.plan.run_plan import RunPlan
from tests.unit.plan_cases import LLAMA_3_8B, config, gpus, planned
from tests.yaml_text import read_yaml

QLORA: dict[str, Any] = {"adapter": {"method": "qlora"}}
LONG_FORM: dict[str, Any] = {"adapter": {"method": "lora"}, "model": {"quantization": "nf4"}}


def test_the_preset_and_its_long_form_are_the_same_plan() -> None:
    short, long = planned(gpus(1), LLAMA_3_8B, **QLORA), planned(gpus(1), LLAMA_3_8B, **LONG_FORM)
    assert (short.model, short.adapter) == (long.model, long.adapter)
    assert (short.memory, short.optimization) == (long.memory, long.optimization)
    assert "adapter.method qlora is lora over a base with model.quantization nf4" in " ".join(short.reasons)
    assert "over a base in nf4" in dict(plan_table(long))["method"]
    assert RunPlan.model_validate_json(long.model_dump_json()) == long


def test_a_run_goes_on_under_the_other_form_of_the_same() -> None:
    forms = {True: QLORA, False: LONG_FORM}
    for first in (True, False):
        before, now = config(**forms[first]), config(**forms[not first])
        was, plan = (planned(gpus(1), LLAMA_3_8B, **forms[form]) for form in (first, not first))
        assert certain_changes(was, before, now) == []
        assert changes_in_keys(was, plan, before, now) == []
    plain: dict[str, Any] = {"adapter": {"method": "lora"}}
    was, plan = planned(gpus(1), LLAMA_3_8B, **QLORA), planned(gpus(1), LLAMA_3_8B, **plain)
    assert changes_in_keys(was, plan, config(**QLORA), config(**plain)), "another base is another run"
    none: dict[str, Any] = plain | {"model": {"quantization": "none"}}
    assert certain_changes(planned(gpus(1), LLAMA_3_8B, **plain), config(**plain), config(**none)) == []


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"quantization": "int8"}, "model.quantization"),
    ({"quantization": "none"}, "model.quantization"),
    ({"quantization": "fp4"}, "model.quantization"),
    ({"double_quantization": False}, "model.double_quantization"),
]


@pytest.mark.parametrize(("model", "key"), CONTRADICTIONS)
def test_sections_at_odds_are_refused_at_the_key_and_by_the_plan(model: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}  is .*, but adapter\.method qlora sets adapter\."):
        config_from(QLORA | {"model": model, "data": {"train": "x.jsonl"}})
    with pytest.raises(UserError, match=rf"{key} is .*, but adapter\.method qlora sets .*Leave {key} out"):
        planned(gpus(1), LLAMA_3_8B, **QLORA, model=model)


def test_dtypes_that_the_preset_leaves_open_are_taken_from_the_model_section() -> None:
    both = config_from(QLORA | {"model": {"quantization": "nf4", "quant_storage": "uint8"}, "data": {"train": "x.jsonl"}})
    held = held_base(both.model, both.adapter).quantization
    assert held is not None
    assert held.quant_storage == "uint8"


@pytest.mark.parametrize("model", [{"double_quantization": True}, {"quant_storage": "uint8"}, {"quant_compute_dtype": "fp16"}])
def test_what_only_4_bits_read_is_refused_without_them(model: dict[str, Any]) -> None:
    for held in ({}, {"quantization": "int8"}):
        with pytest.raises(ConfigError, match=r"does not read it; leave it out, or set model\.quantization to nf4 or fp4"):
            config_from({"model": model | held, "data": {"train": "x.jsonl"}})


def test_a_base_that_is_trained_itself_cannot_be_quantised() -> None:
    with pytest.raises(
        UserError, match=r"model\.quantization is nf4, but adapter\.method is full.*set model\.quantization to none"
    ):
        planned(gpus(1), LLAMA_3_8B, adapter={"method": "full"}, model={"quantization": "nf4"})


@pytest.mark.parametrize("sections", [QLORA, LONG_FORM, QLORA | {"model": {"quant_storage": "uint8"}}])
def test_every_form_survives_being_written_out_in_full(sections: dict[str, Any]) -> None:
    written = config_from(sections | {"data": {"train": "x.jsonl"}})
    assert config_from(read_yaml(dump_yaml(written, full=True))) == written
