"""`model.rope_scaling` in configs and plans: what it allows, what is refused and in which words."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from raytune.config.load import ConfigError, load_config
from raytune.config.sections.run import RunConfig
from raytune.errors import UserError
from raytune.plan.choosing.requirements import choose_row_length
from raytune.plan.describe import plan_table
from raytune.plan.identity.identity import differences, identity_of
from raytune.plan.identity.settings import key_of
from raytune.plan.model.architectures import model_shape
from raytune.plan.model.base_model import read_model_shape
from raytune.plan.model.references import REFERENCES
from raytune.plan.model.rope import positions_of, resolve_rope
from raytune.plan.model.shapes import ModelShape
from tests.tiny import tiny_plan
from tests.unit.plan_cases import DEMO, LLAMA_3_8B, gpus, planned

YARN: dict[str, Any] = {"type": "yarn", "factor": 4}


def config(scaling: dict[str, Any], **sections: Any) -> RunConfig:
    return RunConfig.model_validate({"model": {"base": "demo", "rope_scaling": scaling}} | sections)


def shape(**changes: Any) -> ModelShape:
    """Of a small Llama whose config says more."""
    written = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 259,
        "max_position_embeddings": 2048,
    }
    return model_shape(written | changes, "config.json")


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"type": "linear", "factor": 0.5}, "must be a number >= 1"),
        ({"type": "linear", "factor": 2, "beta_fast": 32}, "model.rope_scaling.type linear does not read it"),
        ({"type": "linear", "factor": 2, "rope_theta": 1e6}, "rope_theta"),
        ({"type": "yarn", "factor": 2, "low_freq_factor": 1}, "model.rope_scaling.type yarn does not read it"),
        ({"type": "yarn", "factor": 2, "mscale": 1}, "mscale and mscale_all_dim go together"),
        ({"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}, "beta_slow 2 must be below beta_fast 1"),
        ({"type": "llama3", "factor": 8}, "needs low_freq_factor and high_freq_factor"),
        ({"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}, "must be below high_freq_factor"),
        ({"type": "longrope", "factor": 8}, "longrope"),
        ({"factor": 8}, "type"),
    ],
    ids=str,
)
def test_what_transformers_passes_over_in_silence_is_refused(scaling: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"model": {"base": "demo", "rope_scaling": scaling}}))
    with pytest.raises(ConfigError, match=words):
        load_config([file])


def test_documents_may_be_as_long_as_the_positions_reach() -> None:
    assert choose_row_length(config(YARN, data={"max_length": 4 * DEMO.max_positions}), DEMO) == 4 * DEMO.max_positions
    with pytest.raises(UserError, match=f"has {4 * DEMO.max_positions} positions"):
        choose_row_length(config(YARN, data={"max_length": 4 * DEMO.max_positions + 1}), DEMO)
    assert positions_of(config(YARN | {"original_max_position_embeddings": 1024}).model, DEMO) == 4096


def test_yarns_original_length_is_the_bases_and_not_the_raised_one() -> None:
    rope = resolve_rope(config(YARN).model, DEMO)
    assert rope is not None
    assert rope.parameters == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    assert rope.max_position_embeddings == 8192
    dynamic = resolve_rope(config({"type": "dynamic", "factor": 4}).model, DEMO)
    assert dynamic is not None
    assert (dynamic.parameters, dynamic.max_position_embeddings) == ({"rope_type": "dynamic", "factor": 4.0}, 2048)


def test_a_base_that_is_scaled_already_gets_another_scaling_from_where_it_began() -> None:
    llama_3_1 = model_shape(REFERENCES["meta-llama/Llama-3.1-8B"], "config.json")
    assert llama_3_1.max_positions == 131_072
    rope = resolve_rope(config({"type": "yarn", "factor": 32}).model, llama_3_1)
    assert rope is not None
    assert (rope.original_positions, rope.max_position_embeddings) == (8192, 262_144)
    with pytest.raises(UserError, match=re.escape("Set model.rope_scaling.factor to 16 or more")):
        resolve_rope(config({"type": "yarn", "factor": 8}).model, llama_3_1)
    linear = shape(rope_scaling={"type": "linear", "factor": 4.0})
    with pytest.raises(UserError, match="does not say which length it had before"):
        resolve_rope(config(YARN).model, linear)
    assert resolve_rope(config(YARN | {"original_max_position_embeddings": 512}).model, linear) is not None


def test_a_base_with_dynamic_scaling_has_the_positions_that_it_allows() -> None:
    dynamic = shape(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    assert dynamic.max_positions == 8192
    rope = resolve_rope(config({"type": "linear", "factor": 8}).model, dynamic)
    assert rope is not None
    assert rope.original_positions == 2048


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (model_shape({"model_type": "gpt2", "n_embd": 24, "n_head": 4, "n_layer": 2, "vocab_size": 99}, "gpt2"), "has none"),
        (shape(rope_scaling={"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}), "longrope"),
        (shape(rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0}}), "for each kind of layer"),
        (shape(rope_scaling={"type": "mrope", "mrope_section": [1, 1, 1]}), "mrope"),
    ],
    ids=["gpt2", "longrope", "by layer", "mrope"],
)
def test_positions_that_are_not_rotary_or_not_of_one_kind_are_refused(base: ModelShape, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_rope(config(YARN).model, base)


def test_an_original_length_beyond_the_bases_is_refused() -> None:
    with pytest.raises(UserError, match="original_max_position_embeddings to 2048 or less"):
        resolve_rope(config(YARN | {"original_max_position_embeddings": 4096}).model, DEMO)


def test_plans_say_what_is_stretched_and_what_an_adapter_needs() -> None:
    plan = planned(gpus(8), LLAMA_3_8B, model={"rope_scaling": YARN}, adapter={"method": "lora"})
    notes = " ".join(plan.notes)
    assert "'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 8192" in notes
    assert "of no use for documents of at most 2048 tokens" in notes
    assert dict(plan_table(plan))["positions"] == "rotary positions stretched by yarn: 4.0 x 8192"
    whole = planned(gpus(8), LLAMA_3_8B, model={"rope_scaling": YARN}, adapter={"method": "full"}, data={"max_length": 16_384})
    assert "rope" not in " ".join(whole.notes)


def test_positions_are_part_of_a_runs_identity() -> None:
    rope = resolve_rope(config(YARN).model, DEMO)
    was, now = identity_of(tiny_plan()), identity_of(tiny_plan(model={"rope": rope}))
    assert {key_of(leaf) for leaf in differences(was, now)} == {"model.rope_scaling"}
    before = was | {"model": {name: value for name, value in was["model"].items() if name != "rope"}}
    assert not differences(before, was)  # of a raytune that had no such key


def test_the_shapes_of_files_in_both_forms_are_read(tmp_path: Path) -> None:
    form_4 = shape(rope_theta=5e5, rope_scaling={"type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512})
    form_5 = shape(
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 512}
    )
    assert form_4.rope == form_5.rope
    assert read_model_shape("demo").rope == shape().rope
