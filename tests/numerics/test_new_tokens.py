"""New tokens = plain transformers and PEFT, written here without our code: start, curve, ZeRO, files, merging."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, TrainableTokensConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from raytune.config.sections.data import DataSource
from raytune.config.sections.model import ModelSection
from raytune.config.sections.run import RunConfig
from raytune.data.store.build import build_store
from raytune.data.store.store import Store
from raytune.data.templates.tokenizers import open_tokenizer, tokenizer_fingerprint, vocabulary_of
from raytune.model.files.export import save_adapter, save_model
from raytune.model.inference import load_saved
from raytune.model.kept_base import KeptBase
from raytune.model.load import load_model
from raytune.model.merging.merge import merge_adapter
from raytune.plan.choosing.setting import settle
from raytune.plan.model.base_model import read_model_shape
from raytune.plan.model.shapes import ModelShape
from raytune.plan.run_plan import RunPlan
from raytune.plan.strategies.new_tokens import with_new_tokens
from tests.numerics.oracles import peft_losses
from tests.numerics.runs import (
    SAME_SUMS,
    Change,
    Material,
    Outcome,
    largest_difference,
    make_plan,
    outcome,
    relative_difference,
    run,
    short_rows,
    start,
    steps_of,
    train,
)
from tests.numerics.strategies import plain_training
from tests.tiny import save_tiny_model, store_plan, tiny_request
from tests.unit.plan_cases import CPU as MACHINE
from tests.variants import variants

CPU = torch.device("cpu")
NEW: list[Any] = ["<tool>", {"token": "<cite>", "description": "the source"}, {"token": "[[", "special": False}]
TEXTS = ["<tool>", "<cite>", "[["]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SLOW = pytest.mark.slow
LORA: dict[str, Any] = {"method": "lora", "rank": 4, "alpha": 8}


@dataclass(frozen=True, kw_only=True)
class Base:
    material: Material
    tied: bool


OTHER_BASES = ("room", "padded")
ONE_BASE = pytest.mark.parametrize("base", variants(["tied"], ["untied", *OTHER_BASES]), indirect=True)
"""For what has been held against plain transformers and PEFT over both."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """`room`: more rows than the tokenizer has tokens, as Qwen's bases have."""

    def made(kind: str) -> Base:
        folder = tmp_path_factory.mktemp(kind)
        tied = kind in ("tied", "room")
        path = save_tiny_model(folder / "model", tied=tied, **({"vocab_size": 272} if kind == "room" else {}))
        return Base(material=material_of(path, folder), tied=tied)

    return cache(made)


@pytest.fixture(params=variants(["tied", "untied"], OTHER_BASES))
def base(request: pytest.FixtureRequest, bases: Callable[[str], Base]) -> Base:
    return bases(request.param)


def material_of(path: Path, folder: Path) -> Material:
    rows = short_rows(40)
    for number, row in enumerate(rows):
        for message in row["messages"]:
            message["content"] = f"<tool>{message['content']} <cite>[[{number}"
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tokens = section(path).new_tokens
    tokenizer = open_tokenizer(str(path), new_tokens=tokens)
    wanted = tiny_request(max_length=180, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
    wanted = replace(wanted, sources=(DataSource(path=str(folder / "rows.jsonl")),))
    info = build_store(wanted, tokenizer_path=str(path), folder=folder / "stores", new_tokens=tokens)
    return Material(model=path, with_dropout=path, other_with_dropout=path, store=store_plan(info))


def section(path: Path, **changes: Any) -> ModelSection:
    multiple = 16 if "padded" in str(path) else 1
    return ModelSection.model_validate({"base": str(path), "new_tokens": NEW, "vocabulary_multiple": multiple} | changes)


def shape_of(model: ModelSection) -> ModelShape:
    return with_new_tokens(read_model_shape(model.base), model, vocabulary_of(open_tokenizer(model.base)))


def plan_of(base: Base, adapter: dict[str, Any], **changes: Any) -> RunPlan:
    """As the planner decides, and `make_plan` divides."""
    model = section(base.material.model)
    setting = settle(RunConfig.model_validate({"adapter": adapter, "model": model.model_dump()}), shape_of(model), MACHINE)
    fields = {"path": model.base, "new_tokens": model.model_dump()["new_tokens"], "num_embeddings": setting.shape.vocab}
    return make_plan(
        base.material,
        adapter=setting.adapter.model_dump(),
        model=fields | changes.pop("model", {}),
        optimization={"learning_rate": 5e-3, "weight_decay": 0.0},
        num_trainable=setting.trained.num_trainable,
        num_parameters=setting.shape.num_parameters,
        **changes,
    )


# --- the same by transformers and PEFT alone


def plain_numbers(path: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"additional_special_tokens": TEXTS})
    return [tokenizer.convert_tokens_to_ids(text) for text in TEXTS]


def plain_base(path: Path, num_rows: int, **how: Any) -> Any:
    """Rows by hand: the mean of all, or of those of a description."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    num_tokens, described = len(tokenizer), tokenizer("the source", add_special_tokens=False)["input_ids"]
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **how)
    num_old = model.config.vocab_size
    if num_rows > num_old:
        model.resize_token_embeddings(num_rows)
    numbers = plain_numbers(path)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            weight = module.weight
            rows = {number: weight[:num_tokens].mean(0) for number in {*numbers, *range(num_old, num_rows)}}
            rows[numbers[1]] = weight[described].mean(0)
            for number, row in rows.items():
                weight[number] = row
    return model


def trained_numbers(base: Base) -> list[int]:
    rows = shape_of(section(base.material.model))
    return sorted({*plain_numbers(base.material.model), *range(rows.vocab - rows.added_rows, rows.vocab)})


def lora_with_rows(base: Base) -> PeftConfig:
    numbers = trained_numbers(base)
    tokens: Any = numbers if base.tied else {"embed_tokens": numbers, "lm_head": numbers}
    return LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, trainable_token_indices=tokens, task_type="CAUSAL_LM")


def lora_with_whole(base: Base) -> PeftConfig:
    saved = ["embed_tokens", "lm_head"]
    return LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, modules_to_save=saved, task_type="CAUSAL_LM")


def rows_alone(base: Base) -> PeftConfig:
    modules = ["embed_tokens"] if base.tied else ["embed_tokens", "lm_head"]
    return TrainableTokensConfig(token_indices=trained_numbers(base), target_modules=modules, task_type="CAUSAL_LM")


@dataclass(frozen=True, kw_only=True)
class Way:
    adapter: dict[str, Any]
    config: Callable[[Base], PeftConfig]


WAYS = {
    "lora with rows": Way(adapter=LORA, config=lora_with_rows),
    "lora with whole": Way(adapter=LORA | {"modules_to_save": ["embed_tokens", "lm_head"]}, config=lora_with_whole),
    "rows alone": Way(adapter={"method": "trainable_tokens"}, config=rows_alone),
}
FULL: dict[str, Any] = {"method": "full"}
ADAPTERS: dict[str, dict[str, Any]] = {name: way.adapter for name, way in WAYS.items()} | {"full": FULL}
OFTEN = ("lora with rows",)


def ways_over(*often: tuple[str, str]) -> pytest.MarkDecorator:
    """Each way over each base. What is often seen of a way over one base by the curve, is over the other one by what is saved."""
    every = product(WAYS, ("tied", "untied", *OTHER_BASES))
    cases = variants(often, [case for case in every if case not in often])
    return pytest.mark.parametrize(("name", "base"), cases, indirect=["base"])


@cache
def run_alone(base: Base, name: str) -> Outcome:
    return train(plan_of(base, ADAPTERS[name]))


@pytest.fixture
def alone(base: Base) -> Callable[[str], Outcome]:
    """What one plain process has, by adapter."""
    return partial(run_alone, base)


def test_tokens_and_rows_are_plain_transformers(base: Base) -> None:
    plan = plan_of(base, FULL)
    ours: Any = load_model(plan.model, plan.adapter, device=CPU, seed=0)
    plain = plain_base(base.material.model, plan.model.num_embeddings or 0)
    assert ours.config.vocab_size == plain.config.vocab_size == shape_of(section(base.material.model)).vocab
    theirs = dict(plain.named_parameters())
    for name, value in ours.named_parameters():
        assert (value - theirs[name]).abs().max() <= 1e-7, name
    assert sum(value.numel() for value in theirs.values()) == plan.num_parameters
    store = Store.open(plan.data.train.path)
    used = {int(number) for row in range(store.num_rows) for number in store.row(row).input_ids}
    assert {*plain_numbers(base.material.model)} <= used


@ways_over(("lora with rows", "tied"), ("lora with whole", "untied"), ("rows alone", "tied"))
def test_the_curve_is_plain_peft_s(name: str, base: Base, alone: Callable[[str], Outcome]) -> None:
    plan = plan_of(base, WAYS[name].adapter)
    ours = alone(name)
    model = plain_base(base.material.model, plan.model.num_embeddings or 0)
    assert relative_difference(ours.losses, peft_losses(model, plan, WAYS[name].config(base))) <= SAME_SUMS
    assert ours.losses[-1] < ours.losses[0] - 0.005, "something was learned"
    assert plan.num_trainable == sum(value.numel() for value in ours.weights.values())


def test_full_fine_tuning_is_plain_torch_s(base: Base, alone: Callable[[str], Outcome]) -> None:
    plan = plan_of(base, FULL)
    losses, weights = plain_training(plan, lambda _: True, base=plain_base(base.material.model, plan.model.num_embeddings or 0))
    ours = alone("full")
    assert relative_difference(ours.losses, losses) <= SAME_SUMS
    assert max((ours.weights[name] - weights[name]).abs().max() for name in weights) <= 2e-6
    assert plan.num_trainable == sum(value.numel() for value in weights.values())


@ONE_BASE
@pytest.mark.parametrize(("chunk_tokens", "checkpointing"), variants([(16, False), (16, True)], [(None, True)]))
def test_rows_learn_the_same_by_any_loss_and_with_checkpointing(
    chunk_tokens: int | None, checkpointing: bool, base: Base, alone: Callable[[str], Outcome]
) -> None:
    other = plan_of(base, LORA, loss={"chunk_tokens": chunk_tokens}, model={"gradient_checkpointing": checkpointing})
    assert relative_difference(train(other).losses, alone("lora with rows").losses) <= SAME_SUMS


@ONE_BASE
@pytest.mark.parametrize("stage", [pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), 3])
@pytest.mark.parametrize("name", variants(OFTEN, [name for name in ADAPTERS if name not in OFTEN]))
def test_every_stage_on_two_ranks_equals_one_plain_process(
    name: str, stage: int, base: Base, alone: Callable[[str], Outcome]
) -> None:
    sharded = run(plan_of(base, ADAPTERS[name], workers=2, stage=stage, loss={"chunk_tokens": 16}))
    assert sharded[0].numbers == sharded[1].numbers
    assert relative_difference(sharded[0].losses, alone(name).losses) <= SAME_SUMS
    assert largest_difference(sharded[0], alone(name)) <= 3e-6


@ONE_BASE
@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=SLOW)])
@pytest.mark.parametrize("name", variants(OFTEN, [name for name in ADAPTERS if name not in OFTEN]))
def test_resumed_equals_unbroken(name: str, stage: int, base: Base, alone: Callable[[str], Outcome], tmp_path: Path) -> None:
    plan = plan_of(base, ADAPTERS[name], stage=stage)
    go: Callable[..., Outcome] = train if stage == 0 else lambda *given: run(*given)[0]
    unbroken = alone(name) if stage == 0 else go(plan)
    go(plan, Change(stop=3, save=tmp_path))
    resumed = go(plan, Change(start=3, load=tmp_path / "rank-0"))
    assert resumed.losses == unbroken.losses[3:]
    assert largest_difference(resumed, unbroken) == 0


def trained(plan: RunPlan) -> tuple[Any, Outcome]:
    engine, loss_sum, batches_of = start(plan)
    return engine, outcome(engine, [result.read(engine) for result in steps_of(plan, engine, loss_sum, batches_of)])


@torch.no_grad()
def logits(model: nn.Module, plan: RunPlan) -> torch.Tensor:
    ids = torch.tensor(Store.open(plan.data.train.path).row(0).input_ids[:80], dtype=torch.long)[None]
    return model(input_ids=ids, use_cache=False).logits


@ways_over(("lora with rows", "untied"), ("lora with whole", "tied"), ("rows alone", "untied"))
def test_what_is_saved_computes_the_same_in_plain_peft_and_merged(name: str, base: Base, tmp_path: Path) -> None:
    plan = plan_of(base, WAYS[name].adapter)
    engine, seen = trained(plan)
    save_adapter(engine.model, seen.weights, tmp_path / "adapter")
    engine_logits = logits(engine.model.eval(), plan)
    plain: Any = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32)
    if plan.model.num_embeddings != plain.config.vocab_size:
        plain.resize_token_embeddings(plan.model.num_embeddings)  # rows are drawn at random, and covered by the adapter's
    before = logits(plain, plan)
    theirs: Any = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    assert (engine_logits - logits(theirs, plan)).abs().max() <= SAME_SUMS
    assert (engine_logits - before).abs().max() > 1e-2
    again: Any = load_saved(plan, tmp_path / "adapter", device=CPU)
    assert {key for key, one in again.named_parameters() if one.requires_grad} == {*seen.weights}
    assert (engine_logits - logits(again.eval(), plan)).abs().max() <= SAME_SUMS
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.vocab_size == plan.model.num_embeddings
    assert merged.config.tie_word_embeddings == (base.tied and name != "lora with whole")
    assert (engine_logits - logits(merged, plan)).abs().max() <= 1e-5, "sums in another order"


def test_a_whole_model_is_loaded_by_plain_transformers_and_not_given_rows_again(base: Base, tmp_path: Path) -> None:
    plan = plan_of(base, FULL)
    engine, _ = trained(plan)
    save_model(engine.model, ((name, value) for name, value in engine.model_state() if value is not None), tmp_path)
    ours = logits(engine.model.eval(), plan)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert plain.config.vocab_size == plan.model.num_embeddings
    assert (ours - logits(plain, plan)).abs().max() <= SAME_SUMS
    again: Any = load_saved(plan, tmp_path, device=CPU)
    assert (ours - logits(again.eval(), plan)).abs().max() <= SAME_SUMS


@ONE_BASE
@pytest.mark.parametrize("kind", variants(["nf4"], ["int8"]))
def test_over_a_quantised_base_rows_are_those_of_plain_peft(kind: str, base: Base) -> None:
    quantization = {"format": kind, "compute_dtype": "fp32", "quant_storage": "uint8"}
    plan = plan_of(base, LORA, model={"quantization": quantization})
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**(four if kind == "nf4" else {"load_in_8bit": True}), bnb_4bit_compute_dtype=torch.float32)
    model = plain_base(base.material.model, plan.model.num_embeddings or 0, quantization_config=config, device_map={"": "cpu"})
    ours = train(plan)
    assert relative_difference(ours.losses, peft_losses(model, plan, lora_with_rows(base))) <= SAME_SUMS
    assert any("trainable_tokens_delta" in name for name in ours.weights)


def test_rows_of_tokens_that_are_there_are_trained_by_name(base: Base) -> None:
    plan = plan_of(base, LORA | {"trainable_tokens": ["a", "<tool>", "b"]})
    ours = train(plan)
    numbers = sorted({*trained_numbers(base), ord("a"), ord("b")})
    tokenizer = AutoTokenizer.from_pretrained(base.material.model)
    numbers = sorted({*trained_numbers(base), *tokenizer.convert_tokens_to_ids(["a", "b"])})
    tokens: Any = numbers if base.tied else {"embed_tokens": numbers, "lm_head": numbers}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, trainable_token_indices=tokens, task_type="CAUSAL_LM")
    model = plain_base(base.material.model, plan.model.num_embeddings or 0)
    assert relative_difference(ours.losses, peft_losses(model, plan, config)) <= SAME_SUMS
    assert plan.num_trainable == sum(value.numel() for value in ours.weights.values())


@ONE_BASE
def test_a_kept_base_is_not_given_to_a_trial_with_other_tokens(base: Base) -> None:
    kept = KeptBase()
    plans = [plan_of(base, LORA), plan_of(base, LORA | {"trainable_tokens": ["a"]})]
    plans.append(
        plans[0].model_copy(update={"model": plans[0].model.model_copy(update={"new_tokens": [], "num_embeddings": None})})
    )
    for plan in [*plans, *plans]:
        model: Any = load_model(plan.model, plan.adapter, device=CPU, seed=0, kept=kept)
        fresh: Any = load_model(plan.model, plan.adapter, device=CPU, seed=0)
        assert {name: value.shape for name, value in model.named_parameters()} == {
            name: value.shape for name, value in fresh.named_parameters()
        }
        assert all(value.equal(dict(fresh.named_parameters())[name]) for name, value in model.named_parameters())


def test_where_a_model_stops_is_kept(base: Base) -> None:
    plan = plan_of(base, FULL)
    model: Any = load_model(plan.model, plan.adapter, device=CPU, seed=0)
    own = GenerationConfig.from_model_config(AutoModelForCausalLM.from_pretrained(plan.model.path).config)
    assert model.generation_config.eos_token_id == own.eos_token_id
