"""A plan in words."""

from raytune.plan.describe import plan_table, plan_text
from tests.unit.plan_cases import LLAMA_3_8B, data, gpus, planned


def test_the_table_says_what_is_trained_on_what_for_how_long() -> None:
    plan = planned(
        gpus(8), LLAMA_3_8B, data(10_000, validation=("held_out",)), adapter={"method": "qlora"}, data={"validation": "v.jsonl"}
    )
    table = dict(plan_table(plan))
    assert table["model"] == "/models/base, 8.03B parameters in bf16"
    assert table["method"] == "lora rank 16 on all-linear over a base in nf4, 41.9M trained parameters (0.522% of the base)"
    assert table["batch"] == "8 workers x 2 packed rows x 1 accumulation = 16 packed rows per step"
    assert table["run"] == "1875 steps, 3 epochs, about 32.8k tokens per step"
    assert table["data"] == "10000 packed rows of up to 2048 tokens (100% full), 6.83M target tokens; held_out: 50 packed rows"
    assert table["checkpoints"] == "every 187 steps, 480 MiB each; kept: the last 2, the 1 best by validation/loss"
    activations_at, gradients_at = (
        sum(part.num_bytes for part in plan.memory if part.place == "device" and moment in part.moments)
        for moment in ("forward", "first layer")
    )
    assert activations_at > gradients_at
    memory, other_moments = table["memory per worker"].split("; at others: ")
    assert memory.startswith(f"{activations_at / 2**30:.3g} GiB at the fullest moment, the forward pass's end: activations ")
    assert "weights" in memory
    assert "gradients" in other_moments


def test_evaluations_at_saves_are_told() -> None:
    plan = planned(
        facts=data(validation=("a",)),
        data={"validation": "a.jsonl"},
        evaluation={"every_steps": 40},
        checkpoint={"every_steps": 50},
    )
    assert dict(plan_table(plan))["evaluation"] == "every 40 and every 50 steps, after the last and before the first"


def test_the_text_is_aligned_and_ends_with_every_reason() -> None:
    plan = planned()
    lines = plan_text(plan).splitlines()
    assert [line.strip() for line in lines[-len(plan.reasons) :]] == plan.reasons
    width = max(len(label) for label, _ in plan_table(plan))
    assert all(line[width : width + 2] == "  " for line in lines[: len(plan_table(plan))])


def test_offloaded_parts_are_told_apart() -> None:
    plan = planned(gpus(2), LLAMA_3_8B, training={"zero": {"offload_optimizer": "cpu", "offload_parameters": "cpu"}})
    table = dict(plan_table(plan))
    assert table["engine"] == "DeepSpeed ZeRO stage 3, optimizer on cpu, weights on cpu"
    assert "weights" in table["host memory per worker"]
