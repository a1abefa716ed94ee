"""What `strategy` leaves to be trained, how fast it learns, and what is refused, with the place where it was written."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.config.load import load_with_places
from raytune.config.sections.run import RunConfig
from raytune.config.words.places import errors_at
from raytune.errors import PlanError, UserError
from raytune.plan.ahead import plan_ahead
from raytune.plan.choosing.setting import settle
from raytune.plan.costs.memory import bytes_in
from raytune.plan.describe import plan_table
from raytune.plan.facts.data_facts import DataFacts
from raytune.plan.identity.identity import differences, identity_of
from raytune.plan.identity.settings import changes_in_keys
from raytune.plan.model.architectures import model_shape
from raytune.plan.model.shapes import ModelShape
from raytune.plan.run_plan import OptimizationPlan, RunPlan, StorePlan
from raytune.plan.strategies.freezing import folded
from raytune.plan.strategies.update_groups import rate_scale, weight_decay
from tests.tiny import PATIENT, tiny_plan
from tests.unit.plan_cases import CPU, DEMO, LLAMA_3_8B, config, data, gpus, planned

FULL = {"method": "full"}
MIXTRAL = model_shape(
    {
        "model_type": "mixtral",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "num_local_experts": 4,
    },
    "mixtral",
)
GPT2 = model_shape({"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 512}, "gpt2")


def plan(shape: ModelShape = DEMO, adapter: dict[str, Any] | None = None, **strategy: Any) -> RunPlan:
    return planned(shape=shape, adapter=adapter or FULL, strategy=strategy)


def trained_names(shape: ModelShape, adapter: dict[str, Any], **freeze: Any) -> set[str]:
    setting = settle(config(adapter=adapter, strategy={"freeze": freeze}), shape, CPU)
    return {part.name for part in setting.trained.parts}


# --- freezing


def test_first_layers_of_a_full_run_are_frozen_as_layers() -> None:
    training = {"zero": {"stage": 2}, "per_device_train_batch_size": 1, "gradient_checkpointing": False, "loss": "chunked"}
    freeze = {"first_layers": 30, "embeddings": True}
    frozen = planned(gpus(8), LLAMA_3_8B, adapter=FULL, training=training, strategy={"freeze": freeze})
    assert frozen.model.frozen == ["model.embed_tokens", *(f"model.layers.{layer}" for layer in range(30))]
    assert frozen.model.lowest_layer == 30
    assert any("No backward pass runs below layer 30 (of 0 to 31)" in note for note in frozen.notes)
    whole = planned(gpus(8), LLAMA_3_8B, adapter=FULL, training=training)
    layer = sum(module.num_parameters for module in LLAMA_3_8B.layer)
    assert whole.num_trainable - frozen.num_trainable == 30 * layer + 128256 * 4096
    assert bytes_in(frozen.memory, "device") < 0.6 * bytes_in(whole.memory, "device")
    assert frozen.checkpoint_bytes < 0.2 * whole.checkpoint_bytes


def test_an_instance_s_step_is_shorter_the_more_is_frozen() -> None:
    def step_s(**freeze: Any) -> float:
        sections = {
            "model": {"base": "meta-llama/Llama-3.1-8B"},
            "adapter": FULL,
            "cluster": {"instance": "p5.48xlarge"},
            "training": {"zero": {"stage": 2}, "gradient_checkpointing": False},
            "data": {"train": "x.jsonl"},
            "strategy": {"freeze": freeze},
        }
        step = plan_ahead(RunConfig.model_validate(sections), 10_000_000).step_time
        assert step is not None
        return step.compute_s

    whole, half, head = step_s(), step_s(embeddings=True, first_layers=16), step_s(train_only=["head", "model.norm"])
    assert head < half < whole
    assert half == pytest.approx(2 / 3 * whole, rel=0.05), "half of the layers need a third of the work"
    assert head == pytest.approx(1 / 3 * whole, rel=0.2), "forward passes, and all of the head's"


@pytest.mark.parametrize("shape", [DEMO, MIXTRAL, GPT2], ids=["llama", "mixtral", "gpt2"])
def test_words_mean_the_same_in_every_architecture(shape: ModelShape) -> None:
    norms = {module.name for module in shape.modules() if module.kind == "norm"}
    assert trained_names(shape, FULL, train_only=["norms"]) == norms
    embeddings = {module.name for module in shape.embeddings}
    everything = {module.name for module in shape.modules()}
    without = trained_names(shape, FULL, embeddings=True)
    tied = {shape.head.name} if shape.is_tied else set()
    assert without == everything - embeddings - tied
    assert trained_names(shape, FULL, modules=["embeddings"]) == without


def test_patterns_mean_whole_names_last_parts_and_what_lies_below() -> None:
    everything = {module.name for module in DEMO.modules()}
    mlp = {name for name in everything if ".mlp." in name}
    assert trained_names(DEMO, FULL, modules=["mlp"]) == everything - mlp
    assert trained_names(DEMO, FULL, modules=[r"layers\.[12]\.mlp\..*_proj"]) == everything - {
        name for name in mlp if "layers.0" not in name
    }
    assert trained_names(DEMO, FULL, train_only=["layers.2", "q_proj"]) == {
        name for name in everything if "layers.2." in name or "q_proj" in name
    }


def test_experts_of_frozen_layers_get_no_update() -> None:
    adapter = {"method": "lora", "target_modules": "all-linear"}
    names = trained_names(MIXTRAL, adapter, first_layers=2)
    assert "model.layers.2.mlp.experts.gate_up_proj" in names
    assert not any("layers.0." in name or "layers.1." in name for name in names)
    setting = settle(config(adapter=adapter, strategy={"freeze": {"first_layers": 2}}), MIXTRAL, CPU)
    assert setting.adapter.target_parameters == [  # pyright: ignore[reportAttributeAccessIssue]
        f"model.layers.{layer}.mlp.experts.{name}" for layer in (2, 3) for name in ("gate_up_proj", "down_proj")
    ]


def test_the_plan_says_which_experts_are_trained() -> None:
    def notes(**freeze: Any) -> str:
        return " ".join(plan(MIXTRAL, freeze=freeze).notes)

    assert "They are trained, and so are the routers." in notes()
    assert "They are trained in 3 of 4 layers, and so are the routers." in notes(first_layers=1)
    assert "They are trained, and not all routers." in notes(modules=["mlp.gate"])
    assert "strategy.freeze leaves them as they are." in notes(modules=["experts"])


REFUSED: dict[str, tuple[str, str, str]] = {
    "a misspelt name": (
        "adapter: {method: full}\nstrategy:\n  freeze:\n    modules: [mpl]",
        "freeze.modules",
        "Did you mean mlp",
    ),
    "a name of a parameter": (
        "adapter: {method: full}\nstrategy:\n  freeze:\n    train_only: [lm_head.weight]",
        "freeze.train_only",
        "Patterns name modules, without `weight`",
    ),
    "no expression": ("adapter: {method: full}\nstrategy:\n  freeze:\n    modules: ['(']", "freeze.modules", "is not a regular"),
    "too many layers": ("adapter: {method: full}\nstrategy:\n  freeze:\n    first_layers: 9", "first_layers", "has 3 layers"),
    "everything": (
        "adapter: {method: full}\nstrategy:\n  freeze:\n    modules: ['.*']",
        "strategy.freeze",
        "leaves nothing that is trained",
    ),
    "all layers of an adapter": (
        "strategy:\n  freeze:\n    first_layers: 3",
        "strategy.freeze",
        "leaves nothing that is trained",
    ),
    "what an adapter does not train": (
        "strategy:\n  freeze:\n    embeddings: true",
        "freeze.embeddings",
        "adapter.method lora trains nothing of that",
    ),
    "a tied head alone": (
        "adapter: {method: full}\nstrategy:\n  freeze:\n    train_only: [head, norms]",
        "freeze.train_only",
        "they are tied, one matrix",
    ),
    "all but a tied head": (
        "adapter: {method: full}\nstrategy:\n  freeze:\n    modules: [head]",
        "freeze.modules",
        "Freeze both",
    ),
    "a saved module": (
        "adapter: {modules_to_save: [embed_tokens]}\nstrategy:\n  freeze:\n    embeddings: true",
        "adapter.modules_to_save",
        "which strategy.freeze freezes",
    ),
    "a target by name": (
        "adapter: {target_modules: [q_proj, v_proj]}\nstrategy:\n  freeze:\n    modules: [v_proj]",
        "adapter.target_modules",
        "freezes all of it",
    ),
    "a rate of what is frozen": (
        "adapter: {method: full}\nstrategy:\n  freeze: {modules: [mlp]}\n  rate_scales: {mlp: 0.1}",
        "strategy.rate_scales",
        "nothing of that is trained",
    ),
    "a rate of nothing": ("strategy:\n  rate_scales: {nothing: 0.1}", "strategy.rate_scales", "matches no module"),
    "a second decay of the same": (
        "adapter: {method: full}\nstrategy:\n  weight_decay_of: {mlp: 0.1, up_proj: 0.2}",
        "strategy.weight_decay_of",
        "a pattern before it means the same",
    ),
    "a decay of norms by what holds them": (
        "adapter: {method: full}\nstrategy:\n  freeze: {train_only: [norms]}\n  weight_decay_of: {layers: 0.1}",
        "strategy.weight_decay_of",
        "biases and norms only",
    ),
    "a penalty on what is not trained": (
        "strategy:\n  l2_sp: {strength: 0.1}",
        "strategy.l2_sp",
        "adapter.method lora leaves these as they are",
    ),
    "a penalty that comes too late": (
        "adapter: {method: full}\nstrategy:\n  l2_sp: {strength: 0.1}\ntraining: {zero: {offload_optimizer: cpu}}",
        "strategy.l2_sp",
        "Set training.zero.offload_optimizer to none",
    ),
    "importance of what is not trained": (
        "strategy:\n  ewc: {strength: 1.0, data: 'demo:test'}",
        "strategy.ewc",
        "Set adapter.method to full, or leave strategy.ewc out",
    ),
    "importance that comes too late": (
        "adapter: {method: full}\nstrategy:\n  ewc: {strength: 1.0, data: 'demo:test'}\n"
        "training: {zero: {offload_optimizer: cpu}}",
        "strategy.ewc",
        "Set training.zero.offload_optimizer to none",
    ),
    "importance of a part": (
        "adapter: {method: full}\nstrategy:\n  ewc: {strength: 1.0, data: 'demo:test'}\n"
        "  unfreeze: [{last_layers: 1}, {from_step: 1, last_layers: all}]",
        "strategy.ewc",
        "strategy.l2_sp holds weights in phases too",
    ),
    "dropout that there is not": ("model:\n  dropout: {hidden: 0.1}", "model.dropout.hidden", "only attention"),
    "attention without dropout": (
        "model:\n  attention: flex_attention\n  dropout: {attention: 0.1}",
        "model.dropout.attention",
        "has no dropout",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_means_nothing_is_refused_at_its_place(case: str, tmp_path: Path) -> None:
    text, key, said = REFUSED[case]
    path = tmp_path / "run.yaml"
    path.write_text(f"{text}\ndata: {{train: demo:train}}\n")
    asked, places = load_with_places([path])
    with pytest.raises(UserError) as caught, errors_at(asked, places):
        settle(asked, DEMO, CPU)
    assert said in str(caught.value)
    place, _, named = str(caught.value).partition("\n")[0].partition("  ")
    assert key in named
    line = int(place.split(":")[1])
    assert named.rpartition(".")[2] in path.read_text().splitlines()[line - 1]


def test_biases_of_all_layers_are_refused_above_frozen_ones() -> None:
    adapter = {"method": "lora", "bias": "all"}
    with pytest.raises(UserError, match=r"trains the bias of transformer.h.0.*Set adapter.bias to lora_only or none"):
        plan(GPT2, adapter, freeze={"first_layers": 1})
    assert plan(GPT2, adapter | {"bias": "lora_only"}, freeze={"first_layers": 1}).model.lowest_layer == 1


def test_rates_that_change_nothing_are_refused() -> None:
    untied = model_shape(
        {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 512,
        },
        "llama",
    )
    with pytest.raises(UserError, match="nothing is trained below the output head"):
        plan(untied, freeze={"train_only": ["head"]}, layer_rate_decay=0.5)


# --- rates


@PATIENT
@given(
    decay=st.floats(0.1, 1.0),
    factors=st.dictionaries(st.sampled_from(["mlp", "self_attn", r"layers\.1", "norms", "embeddings"]), st.floats(0.01, 100)),
    ratio=st.one_of(st.none(), st.floats(1, 32)),
)
def test_the_scale_of_a_rate_is_the_product_of_all_factors(decay: float, factors: dict[str, float], ratio: float | None) -> None:
    resolved = plan(layer_rate_decay=decay, rate_scales=factors).optimization.model_copy(update={"lora_plus_ratio": ratio})
    meant = {
        "mlp": lambda name: ".mlp." in name,
        "self_attn": lambda name: ".self_attn." in name,
        r"layers\.1": lambda name: ".layers.1." in name,
        "norms": lambda name: "norm" in name,
        "embeddings": lambda name: "embed" in name,
    }
    for module in DEMO.modules():
        if module.name == DEMO.head.name:
            continue  # tied
        layer = next((int(part) for part in module.name.split(".") if part.isdigit()), None)
        above = 0 if module.name == "model.norm" else DEMO.num_layers + 1 if layer is None else DEMO.num_layers - layer
        expected = decay**above * math.prod(factor for name, factor in factors.items() if meant[name](module.name))
        for parameter, dimensions in ((f"{module.name}.weight", 2), (f"base_model.model.{module.name}.lora_B.default.weight", 2)):
            plus = ratio if ratio and "lora_B" in parameter else 1.0
            assert rate_scale(parameter, dimensions, resolved) == pytest.approx(plus * expected, rel=1e-12)


def test_without_a_strategy_every_parameter_has_the_run_s_settings() -> None:
    resolved = plan().optimization
    assert resolved.update_groups == []
    assert rate_scale("model.norm.weight", 1, resolved) == 1
    assert weight_decay("model.layers.0.mlp.up_proj.weight", 2, resolved, has_none=False) == resolved.weight_decay


def test_biases_and_magnitudes_have_no_decay_of_their_own() -> None:
    group = {"modules": ["model.layers.0.self_attn.q_proj"], "weight_decay": 0.5}
    settings: OptimizationPlan = tiny_plan(optimization={"update_groups": [group]}).optimization
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    assert weight_decay(f"{name}.lora_A.default.weight", 2, settings, has_none=False) == 0.5
    assert weight_decay(f"{name}.lora_magnitude_vector.default.weight", 1, settings, has_none=True) == 0
    assert weight_decay(f"{name}.base_layer.bias", 1, settings, has_none=True) == 0
    assert weight_decay("model.layers.0.self_attn.q_projection.weight", 2, settings, has_none=False) == 0


def test_the_plan_shows_rates_from_the_top_down_and_not_all_of_many() -> None:
    shown = planned(gpus(8), LLAMA_3_8B, adapter=FULL, strategy={"layer_rate_decay": 0.9})
    rates = [value for label, value in plan_table(shown) if label in ("rates", "")]
    assert rates[0] == "learning rate 2e-05 (x 1): whatever else is trained"
    assert rates[1] == "learning rate 1.8e-05 (x 0.9): model.layers.31"
    assert rates[-1] == f"learning rate {2e-5 * 0.9**33:.3g} (x {0.9**33:.3g}): model.embed_tokens"
    assert len(rates) < 10
    assert [value for label, value in plan_table(plan()) if label == "rates"] == []
    assert any("lm_head is model.embed_tokens (tied)" in note for note in plan(layer_rate_decay=0.5).notes)


@given(st.dictionaries(st.from_regex(r"[ab]\.[ab]\.[ab]", fullmatch=True), st.integers(0, 1)))
def test_folding_names_changes_no_value(values: dict[str, int]) -> None:
    short = folded(values)
    for name, value in values.items():
        assert {found for path, found in short.items() if f"{name}.".startswith(f"{path}.")} == {value}


# --- a penalty on the way from the base


def test_a_penalty_is_planned_and_told() -> None:
    held = plan(l2_sp={"strength": 0.02})
    assert held.optimization.l2_sp_strength == 0.02
    assert held.optimization.weight_decay == 0
    assert "training.weight_decay is 0: strategy.l2_sp draws" in " ".join(held.reasons)
    assert ("penalty", "L2-SP: 0.02 / 2 x squared way of the trained weights from the base, added to the loss") in plan_table(
        held
    )
    assert any("which is train/penalty" in note for note in held.notes)


def test_a_penalty_of_strength_0_is_none_and_said_to_be() -> None:
    none, off = plan(), plan(l2_sp={"strength": 0})
    assert off.model_copy(update={"notes": none.notes}) == none
    assert "strategy.l2_sp.strength is 0: nothing is added to the loss." in off.notes


GENERAL = StorePlan(name="general", path="/stores/general", num_rows=800, num_tokens=80_000, num_targets=40_000)
EWC = {"strength": 100.0, "data": "general.jsonl"}


def with_general(**changes: Any) -> DataFacts:
    return replace(data(), ewc=GENERAL.model_copy(update=changes))


def test_importance_is_planned_and_told() -> None:
    held = planned(facts=with_general(), adapter=FULL, strategy={"ewc": EWC, "l2_sp": {"strength": 0.1}})
    assert (held.optimization.ewc_strength, held.optimization.ewc_documents) == (100, 500)
    assert held.data.ewc == GENERAL
    table = dict(plan_table(held))
    assert table["penalty"] == (
        "L2-SP: 0.1 / 2 x squared way of the trained weights from the base + EWC: 100 / 2 x the squared way, that of each "
        "counted by its importance, added to the loss"
    )
    assert "general: 500 of its 800 documents, about 50k tokens, a forward and a backward pass for each" in table["importance"]
    assert "strategy.l2_sp and strategy.ewc draw weights to the base" in " ".join(held.reasons)
    parts = {part.name: part.num_bytes for part in held.memory}
    assert parts["importance of weights"] == 4 * held.num_trainable
    few = planned(facts=with_general(num_rows=20), adapter=FULL, strategy={"ewc": EWC})
    assert few.optimization.ewc_documents == 20
    assert any("estimated from 20 documents" in note for note in few.notes)


def test_importance_of_strength_0_is_none_and_said_to_be() -> None:
    none, off = plan(), plan(ewc=EWC | {"strength": 0})
    assert off.model_copy(update={"notes": none.notes}) == none
    assert "strategy.ewc.strength is 0: nothing is added to the loss and nothing estimated." in off.notes


def test_a_plan_makes_room_for_documents_that_are_all_target() -> None:
    """A chat's rows have few targets, plain text nothing else: its logits may be the larger ones."""
    texts = with_general(num_tokens=800 * 2048, num_targets=800 * 2048)
    training = {"per_device_train_batch_size": 1, "loss": "full"}
    sections: dict[str, Any] = {"adapter": FULL, "strategy": {"ewc": EWC}, "training": training}
    chats = with_general(num_tokens=800 * 2048, num_targets=800 * 2048 // 3)
    logits = [
        next(part.num_bytes for part in planned(facts=facts, **sections).memory if part.name == "logits and loss")
        for facts in (chats, texts)
    ]
    assert logits[1] == pytest.approx(1.5 * logits[0], rel=0.01), "all of 2048 in place of twice a third"


def test_squares_are_not_estimated_in_fp16() -> None:
    with pytest.raises(PlanError, match=r"no numbers below 6e-8.*Set training.precision to bf16 or fp32"):
        planned(gpus(1), facts=with_general(), adapter=FULL, strategy={"ewc": EWC}, training={"precision": "fp16"})


def test_an_instance_s_time_and_money_count_the_estimate() -> None:
    sections: dict[str, Any] = {
        "model": {"base": "meta-llama/Llama-3.1-8B"},
        "adapter": FULL,
        "cluster": {"instance": "p5.48xlarge"},
        "data": {"train": "x.jsonl"},
    }
    free, held = (
        plan_ahead(RunConfig.model_validate(sections | {"strategy": strategy}), 10_000_000)
        for strategy in ({}, {"ewc": EWC | {"max_documents": 800}})
    )
    assert free.importance_s is None
    assert held.importance_s is not None
    assert held.cost is not None
    assert held.step_time is not None
    steps_s = held.optimization.num_steps * held.step_time.seconds
    assert 3600 * held.cost.hours == pytest.approx(steps_s + held.importance_s)
    assert "800 documents, as long as rows" in " ".join(held.reasons)


def test_what_importance_is_estimated_from_is_part_of_a_run() -> None:
    def changed(**ewc: Any) -> list[str]:
        asked = {"ewc": EWC | ewc}
        facts = with_general(path=f"/stores/{ewc.get('data', 'general')}")
        before = planned(facts=with_general(), adapter=FULL, strategy={"ewc": EWC})
        after = planned(facts=facts, adapter=FULL, strategy=asked)
        configs = (config(adapter=FULL, strategy={"ewc": EWC}), config(adapter=FULL, strategy=asked))
        return [key for key, _, _ in changes_in_keys(before, after, *configs)]

    assert changed() == []
    assert changed(strength=1.0) == ["strategy.ewc.strength"]
    assert changed(max_documents=100) == ["strategy.ewc.max_documents"]
    assert changed(max_documents=900) == ["strategy.ewc.max_documents"]
    assert changed(data="other.jsonl") == ["strategy.ewc.data"]


# --- identity


@pytest.mark.parametrize(
    ("adapter", "sections", "key"),
    [
        (FULL, {"strategy": {"freeze": {"first_layers": 1}}}, "strategy.freeze.first_layers"),
        ({"method": "lora"}, {"strategy": {"freeze": {"first_layers": 1}}}, "strategy.freeze.first_layers"),
        (FULL, {"strategy": {"layer_rate_decay": 0.5}}, "strategy.layer_rate_decay"),
        (FULL, {"strategy": {"rate_scales": {"mlp": 0.5}}}, "strategy.rate_scales.mlp"),
        (FULL, {"strategy": {"weight_decay_of": {"mlp": 0.5}}}, "strategy.weight_decay_of.mlp"),
        (FULL, {"model": {"dropout": {"attention": 0.1}}}, "model.dropout.attention"),
        (FULL, {"strategy": {"l2_sp": {"strength": 0.1}}}, "strategy.l2_sp.strength"),
    ],
)
def test_another_strategy_is_another_run_told_in_its_key(adapter: dict[str, Any], sections: dict[str, Any], key: str) -> None:
    before, after = planned(adapter=adapter), planned(adapter=adapter, **sections)
    assert differences(identity_of(before), identity_of(after))
    changes = changes_in_keys(before, after, config(adapter=adapter), config(adapter=adapter, **sections))
    assert [change[0] for change in changes] == [key]
