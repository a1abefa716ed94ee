"""Seconds and dollars against figures that are published, and against arithmetic that can be done by hand."""

from typing import Any

import pytest

from raytune.config.sections.adapter import LoraAdapter, PromptTuningAdapter, QloraAdapter
from raytune.config.sections.model import Quantization
from raytune.plan.costs.cost import best_save_interval_s, cost_of
from raytune.plan.costs.hardware import load_catalogue
from raytune.plan.costs.throughput import Speed, flops_per_micro_batch, step_time
from raytune.plan.methods import trained_by
from raytune.plan.model.quantization import quantized_bytes
from raytune.plan.run_plan import StepTimePlan
from tests.unit.plan_cases import LLAMA_3_8B, LLAMA_3_70B
from tests.unit.test_plan_memory import workload

CATALOGUE = load_catalogue()
TOKENS = 2048


def speed(name: str) -> Speed:
    instance = CATALOGUE.instance(name)
    return Speed.of(instance, CATALOGUE.gpu_of(instance))


def timed(name: str, **changes: Any) -> StepTimePlan:
    return step_time(workload(**changes), speed(name), TOKENS)


def test_products_per_token_are_the_published_multiples_of_the_parameters() -> None:
    """Kaplan et al. 2020: 6 P, 8 P with recomputation; LoRA 4 P and 6 P. Attention and the embedding are small here."""
    weights = LLAMA_3_8B.num_product_weights + LLAMA_3_8B.head.num_parameters
    layers = LLAMA_3_8B.num_product_weights / weights

    def multiple(**changes: Any) -> float:
        return flops_per_micro_batch(workload(**changes), row_tokens=1) / weights / TOKENS

    assert multiple() == pytest.approx(6, rel=1e-3)
    assert multiple(has_checkpointing=True) == pytest.approx(6 + 2 * layers, rel=1e-3)
    thin = LoraAdapter(rank=1, target_modules="attention")
    assert multiple(adapter=thin) == pytest.approx(4, rel=2e-3)
    assert multiple(adapter=thin, has_checkpointing=True) == pytest.approx(4 + 2 * layers, rel=2e-3)


def test_attention_takes_its_share_of_long_rows() -> None:
    """12 x layers x width x length per token for both passes (PaLM, appendix B), half by causality, 7/6 as scores come again."""
    long = flops_per_micro_batch(workload(), row_tokens=8192) - flops_per_micro_batch(workload(), row_tokens=0)
    assert long == pytest.approx(12 * 32 * 4096 * 8192 * TOKENS / 2 * 7 / 6)


@pytest.mark.parametrize(
    ("name", "sheet", "published"), [("p5.48xlarge", 989e12, (0.40, 0.58)), ("p4de.24xlarge", 312e12, (0.40, 0.60))]
)
def test_full_fine_tuning_of_8b_uses_the_published_share_of_a_gpu(
    name: str, sheet: float, published: tuple[float, float]
) -> None:
    """torchtitan and llm-foundry publish 40-58 % of H100s and up to 60 % of A100s, as 6 P per token."""
    step = timed(name, zero_stage=3, workers=8, num_tokens=8192, num_targets=8192, chunk_tokens=2048, has_checkpointing=True)
    utilisation = 6 * LLAMA_3_8B.num_parameters * step.tokens_per_s / 8 / sheet
    assert published[0] <= utilisation <= published[1]


def test_small_chunks_of_the_loss_read_the_head_again_and_again() -> None:
    """Of 8k targets and an 8B model on an H100: 12 bytes per weight of a trained head in each chunk, 4 of a frozen one."""
    many = {"num_tokens": 8192, "num_targets": 8192}
    head = LLAMA_3_8B.head.num_parameters
    rate = speed("p5.48xlarge").memory_bytes_per_s

    def extra_s(**changes: Any) -> float:
        small, large = (timed("p5.48xlarge", chunk_tokens=chunk, **many, **changes).memory_s for chunk in (128, 2048))
        return small - large

    assert extra_s() == pytest.approx((64 - 4) * 12 * head / rate)
    assert 0.1 < extra_s() < 0.3, "of a step that takes half a second"
    assert extra_s(adapter=LoraAdapter()) == pytest.approx((64 - 4) * 4 * head / rate)


def test_zero_stages_move_the_published_volumes() -> None:
    """Rajbhandari et al. 2020, section 7: psi for gradients and psi for weights; 3 psi at stage 3, 4 with recomputation."""
    changes = {"workers": 8, "num_tokens": TOKENS}
    psi_s = 2 * LLAMA_3_8B.num_parameters * 7 / 8 / speed("p5.48xlarge").intra_bytes_per_s
    assert timed("p5.48xlarge", zero_stage=1, **changes).communication_s == pytest.approx(2 * psi_s)
    assert timed("p5.48xlarge", zero_stage=2, **changes).communication_s == pytest.approx(2 * psi_s)
    assert timed("p5.48xlarge", zero_stage=2, accumulation=4, **changes).communication_s == pytest.approx(5 * psi_s)
    assert timed("p5.48xlarge", zero_stage=3, **changes).communication_s == pytest.approx(3 * psi_s)
    assert timed("p5.48xlarge", zero_stage=3, accumulation=4, **changes).communication_s == pytest.approx(12 * psi_s)
    assert timed("p5.48xlarge", zero_stage=3, has_checkpointing=True, **changes).communication_s == pytest.approx(4 * psi_s)
    assert timed("p5.48xlarge", workers=1).communication_s == 0


def test_the_network_binds_where_it_is_slow() -> None:
    """70B under ZeRO-3: a gather of 141 GB takes 0.4 s over EFA at 3,200 Gb/s, and half a minute over 100 Gb/s of TCP."""
    changes = {"shape": LLAMA_3_70B, "zero_stage": 3, "workers": 16, "has_checkpointing": True, "num_targets": TOKENS}
    fast, slow = timed("p5.48xlarge", **changes), timed("a2-ultragpu-8g", **changes)
    assert (fast.binds, slow.binds) == ("compute", "communication")
    assert slow.seconds == slow.communication_s > 10 * fast.communication_s


def test_quantised_weights_cost_memory_traffic_and_save_communication() -> None:
    lora, qlora = LoraAdapter(), QloraAdapter(method="qlora")
    changes = {"shape": LLAMA_3_70B, "workers": 8, "zero_stage": 3}
    with_lora, with_qlora = (timed("p4de.24xlarge", adapter=adapter, **changes) for adapter in (lora, qlora))
    assert with_qlora.memory_s > with_lora.memory_s
    assert with_qlora.compute_s == with_lora.compute_s
    assert with_qlora.communication_s < with_lora.communication_s / 3
    assert quantized_bytes(Quantization(), LLAMA_3_70B, trained_by(qlora, LLAMA_3_70B)) < 0.3 * 2 * LLAMA_3_70B.num_quantizable


def test_offload_costs_copies_and_the_host_s_update() -> None:
    kept = timed("p5.48xlarge", zero_stage=3, workers=8)
    offloaded = timed("p5.48xlarge", zero_stage=3, workers=8, offload_optimizer="cpu")
    on_disk = timed("p5.48xlarge", zero_stage=3, workers=8, offload_optimizer="nvme", offload_parameters="cpu")
    assert kept.offload_s == 0
    assert offloaded.offload_s > LLAMA_3_8B.num_parameters / 4e9, "ZeRO-Offload's measured CPU Adam, one node"
    assert on_disk.offload_s > offloaded.offload_s
    assert offloaded.memory_s < kept.memory_s, "the update is the host's"


def test_a_step_is_as_long_as_what_binds_it() -> None:
    for changes in ({}, {"zero_stage": 3, "workers": 64}, {"zero_stage": 2, "workers": 8, "offload_optimizer": "cpu"}):
        for name in ("p5.48xlarge", "g5.48xlarge", "g6e.xlarge"):
            step = timed(name, **changes)
            assert step.seconds == max(step.compute_s + step.memory_s, step.communication_s, step.offload_s)
            parts = {"communication": step.communication_s, "offload": step.offload_s}
            assert step.seconds == parts.get(step.binds, step.compute_s + step.memory_s)
            workers = changes.get("workers", 1)
            assert step.tokens_per_s == pytest.approx(workers * TOKENS / step.seconds)


def test_tokens_per_second_are_those_of_the_data() -> None:
    """As metrics count them: without the 20 virtual ones that pass through the layers with each row."""
    step = step_time(
        workload(adapter=PromptTuningAdapter(method="prompt_tuning"), workers=8, num_tokens=4 * 120), speed("p5.48xlarge"), 120
    )
    assert step.tokens_per_s == pytest.approx(8 * 4 * 100 / step.seconds)


# --- money


def test_the_best_save_interval_is_young_s_and_daly_s() -> None:
    """Young: sqrt(2 x 60 x 86400) = 3220 s. Daly's higher order takes the save itself off and adds a little."""
    assert best_save_interval_s(60, 86_400) == pytest.approx(3220 - 60 + 20, abs=1)
    assert best_save_interval_s(1000, 400) == 400, "saves longer than twice the interval: Daly's other branch"


@pytest.mark.parametrize("save_s", [5.0, 60.0, 600.0])
def test_no_other_interval_loses_less(save_s: float) -> None:
    """Expected share of time that is lost to saves and to repeated work, by Young's model."""
    between = 86_400.0

    def lost(every_s: float) -> float:
        return save_s / (every_s + save_s) + (every_s + save_s) / 2 / between

    best = lost(best_save_interval_s(save_s, between))
    assert all(best <= lost(every) * 1.001 for every in (10, 100, 500, 1000, 3000, 5000, 10_000, 50_000))


def test_dollars_are_hours_times_nodes_times_price() -> None:
    instance = CATALOGUE.instance("p5en.48xlarge")
    cost = cost_of(instance, num_nodes=2, is_spot=False, num_steps=1800, step_s=4.0, checkpoint_bytes=10**11, num_writers=2)
    assert cost.hours == 2
    assert cost.usd == pytest.approx(4 * instance.usd_per_hour)
    assert instance.spot_usd_per_hour is not None
    assert cost.spot_usd == pytest.approx(4 * instance.spot_usd_per_hour)
    assert cost.save_s == pytest.approx(50), "both nodes write"


def test_spot_nodes_want_more_saves_and_lose_more_often() -> None:
    instance = CATALOGUE.instance("p5en.48xlarge")
    facts: dict[str, Any] = {"num_nodes": 8, "num_steps": 50_000, "step_s": 4.0, "checkpoint_bytes": 10**12, "num_writers": 8}
    spot, demand = (cost_of(instance, is_spot=is_spot, **facts) for is_spot in (True, False))
    assert spot.save_every_s < demand.save_every_s / 5
    assert spot.between_interruptions_s == 3 * 3600
    short = cost_of(instance, is_spot=False, **facts | {"num_steps": 10})
    assert short.save_every_s == 40, "a run of 40 s has no more to lose"


def test_what_is_not_rented_costs_nothing() -> None:
    instance = CATALOGUE.instance("dgx-h100")
    cost = cost_of(instance, num_nodes=1, is_spot=False, num_steps=10, step_s=1, checkpoint_bytes=1, num_writers=1)
    assert (cost.usd, cost.spot_usd) == (0, None)
