"""(IA)^3 = plain PEFT's, written here without our training code: its curve, at every ZeRO stage, its files, and a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from raytune.errors import ModelError
from raytune.model.export import save_adapter
from raytune.model.merge import merge_adapter
from raytune.plan.base_model import read_model_shape
from raytune.plan.memory import Workload, memory_parts
from raytune.plan.methods import trained_by
from raytune.plan.run_plan import RunPlan
from tests.numerics.oracles import peft_losses
from tests.numerics.runs import (
    NUM_STEPS,
    SAME_SUMS,
    Change,
    Material,
    largest_difference,
    make_plan,
    outcome,
    relative_difference,
    run,
    start,
    steps_of,
    train,
)

IA3 = {"method": "ia3"}
RATE: dict[str, Any] = {"optimization": {"learning_rate": 2e-2}}


def plain_losses(plan: RunPlan, **base: Any) -> list[float]:
    model: Any = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32, **base)
    config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    return peft_losses(model, plan, config)


def test_the_curve_is_plain_peft_s(material: Material) -> None:
    plan = make_plan(material, adapter=IA3, **RATE)
    losses = train(plan).losses
    assert relative_difference(losses, plain_losses(plan)) <= SAME_SUMS
    assert losses[-1] < losses[0] - 0.005, "something was learned"


def test_the_curve_is_plain_peft_s_over_a_base_in_nf4(material: Material) -> None:
    quantization = {"format": "nf4", "compute_dtype": "fp32", "quant_storage": "uint8"}
    plan = make_plan(material, adapter=IA3, **RATE)
    plan = make_plan(material, adapter=IA3, model=plan.model.model_dump() | {"quantization": quantization}, **RATE)
    held = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.uint8,
    )
    plain = plain_losses(plan, quantization_config=held, device_map={"": "cpu"})
    assert relative_difference(train(plan).losses, plain) <= SAME_SUMS


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_on_two_ranks_equals_one_plain_process(stage: int, material: Material) -> None:
    alone = train(make_plan(material, adapter=IA3, **RATE))
    sharded = run(make_plan(material, workers=2, stage=stage, adapter=IA3, **RATE))
    assert sharded[0].numbers == sharded[1].numbers
    assert relative_difference(sharded[0].losses, alone.losses) <= SAME_SUMS
    assert largest_difference(sharded[0], alone) <= 2 * SAME_SUMS, "factors are around 1"


@pytest.mark.parametrize("stage", [0, 3])
def test_resumed_equals_unbroken(stage: int, material: Material, tmp_path: Path) -> None:
    plan = make_plan(material, stage=stage, adapter=IA3, **RATE)
    unbroken = run(plan)[0]
    run(plan, Change(stop=3, save=tmp_path))
    resumed = run(plan, Change(start=3, load=tmp_path / "rank-0"))[0]
    assert resumed.losses == unbroken.losses[3:]
    assert largest_difference(resumed, unbroken) == 0


def test_what_is_saved_computes_the_same_in_plain_peft_and_has_the_planned_size(material: Material, tmp_path: Path) -> None:
    plan = make_plan(material, adapter=IA3, **RATE)
    engine, loss_sum, batches_of = start(plan)
    assert len([result.read(engine) for result in steps_of(plan, engine, loss_sum, batches_of)]) == NUM_STEPS
    state = outcome(engine, []).weights
    model: Any = engine.model
    save_adapter(model, state, tmp_path)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        ours = model.eval()(input_ids=ids, use_cache=False).logits
        base = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32)
        before = base(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base, str(tmp_path)).eval()(input_ids=ids).logits
    assert (ours - before).abs().max() > 1e-2
    assert (ours - theirs).abs().max() <= SAME_SUMS
    with pytest.raises(ModelError, match="adapter of the kind IA3, and only LoRA's are merged"):
        merge_adapter(tmp_path, tmp_path / "merged")

    shape = read_model_shape(plan.model.path)
    trained = trained_by(plan.adapter, shape)
    assert trained.num_trainable == sum(value.numel() for value in state.values())
    work = Workload(
        shape=shape,
        trained=trained,
        engine="plain",
        zero_stage=0,
        workers=1,
        offload_optimizer="none",
        offload_parameters="none",
        precision="fp32",
        optimizer="adamw",
        attention="varlen",
        has_checkpointing=False,
        accumulation=2,
        num_tokens=1,
        num_targets=1,
        chunk_tokens=None,
        is_on_gpu=False,
    )
    planned = {part.name: part.num_bytes for part in memory_parts(work)}
    held = engine.held_bytes()
    assert planned["weights"] == held.weights
    assert planned["optimizer"] == pytest.approx(held.optimizer, rel=0.02), "a step counter per parameter besides"
