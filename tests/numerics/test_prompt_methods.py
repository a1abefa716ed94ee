"""Methods that lay virtual tokens in front of documents, besides what test_peft_methods.py holds of every method."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune.config.sections.adapter import Adapter
from raytune.errors import ModelError
from raytune.evaluation.generation import write_answers
from raytune.model.adapters import adapting
from raytune.model.attention.attention import implementation_name, model_inputs
from raytune.model.files.export import save_adapter
from raytune.model.inference import load_saved
from raytune.model.kept_base import KeptBase
from raytune.model.load import load_model
from raytune.model.merging.merge import merge_adapter
from raytune.training.start.start import BatchLoss
from tests.numerics.runs import SAME_SUMS, Material, batches_of_rank
from tests.numerics.test_attention import CONFIGS, packed_batch, small_model
from tests.numerics.test_peft_methods import CPU, IDS, logits, plan_of, run_alone
from tests.peft_methods import EVERY, IN_FRONT

TEXT = "Answer in one short sentence."


@pytest.mark.parametrize("method", IN_FRONT)
def test_what_is_saved_computes_the_same_in_plain_peft(method: str, material: Material, tmp_path: Path) -> None:
    engine, seen = run_alone(method, material)
    save_adapter(engine.model, seen.weights, tmp_path / "adapter")
    ours = logits(engine.model.eval())
    base = AutoModelForCausalLM.from_pretrained(material.model, dtype=torch.float32)
    assert (ours[:, -IDS.shape[1] :] - logits(base)).abs().max() > 1e-2
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert (ours - logits(plain)).abs().max() <= SAME_SUMS
    loaded: Any = load_saved(plan_of(method, material), tmp_path / "adapter", device=CPU)
    assert [name for name, one in loaded.named_parameters() if one.requires_grad] == ["prompt_encoder.default.embedding.weight"]
    assert (ours - logits(loaded.eval())).abs().max() <= SAME_SUMS
    with pytest.raises(ModelError, match=r"adapter of the kind \w+, and only those of .*lora.* are merged"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("method", IN_FRONT)
def test_the_start_is_plain_peft_s(method: str, material: Material) -> None:
    plan = plan_of(method, material)
    ours: Any = load_model(plan.model, plan.adapter, device=CPU, seed=plan.seed)
    base: Any = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32)
    torch.manual_seed(plan.seed)
    plain: Any = EVERY[method].adapted(base)
    theirs = {name: one for name, one in plain.named_parameters() if one.requires_grad}
    trained = {name: one for name, one in ours.named_parameters() if one.requires_grad}
    assert trained.keys() == theirs.keys()
    assert all(trained[name].equal(theirs[name]) for name in theirs)
    assert (logits(ours.eval()) - logits(plain.eval())).abs().max() == 0


FEW = {("LlamaConfig", "sdpa"), ("GPT2Config", "varlen"), ("MistralConfig", "varlen"), ("Gemma3TextConfig", "sdpa")}
FEW |= {("GptOssConfig", "eager"), ("DeepseekV3Config", "varlen")}
KINDS = [
    pytest.param(family, kind, marks=() if (family, kind) in FEW else pytest.mark.slow)
    for family in CONFIGS
    for kind in ("varlen", "sdpa", "eager")
]


@pytest.mark.parametrize(("family", "kind"), KINDS)
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_packed_documents_behind_virtual_tokens_equal_each_alone_in_plain_peft(method: str, family: str, kind: Any) -> None:
    """Documents of 1 to 20 tokens, windows of 4: to plain PEFT's model, one document per row."""
    if method == "prefix_tuning" and family == "DeepseekV3Config":
        pytest.skip("refused by the plan: its keys are not as wide as PEFT takes them to be")
    if method == "prefix_tuning" and family == "GPTNeoXConfig":
        pytest.skip("this tiny one names fewer heads of keys, which PEFT reads, than the architecture gives it")
    section: Any = TypeAdapter(Adapter).validate_python(IN_FRONT[method].section)
    batch, model = packed_batch(), small_model(family, "eager").eval()
    plain: Any = IN_FRONT[method].adapted(model).eval()
    bounds = batch.cumulative_lengths.tolist()
    with torch.no_grad():
        expected = [
            plain(input_ids=batch.input_ids[:, start:end], use_cache=False).logits[0, start - end :]
            for start, end in pairwise(bounds)
        ]
        adapting(section).mend(plain)
        model.set_attn_implementation(implementation_name(kind))
        seen = adapting(section).in_front(section, batch)
        packed = plain(**model_inputs(seen, kind)).logits[0]
        packed = packed if method == "prefix_tuning" else packed[seen.token_positions]
    torch.testing.assert_close(packed, torch.cat(expected), rtol=0, atol=1e-5)  # kernels sum in orders of their own


def test_virtual_tokens_start_as_the_tokens_of_a_text_as_plain_peft_takes_them(material: Material) -> None:
    for text in ("Hi", TEXT):  # shorter than five tokens, and longer
        plan = plan_of("prompt_tuning", material)
        section: Any = plan.adapter.model_copy(update={"prompt_init_text": text})
        ours: Any = load_model(plan.model, section, device=CPU, seed=plan.seed)
        base: Any = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32)
        config = PromptTuningConfig(
            num_virtual_tokens=5,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=text,
            tokenizer_name_or_path=plan.model.path,
            task_type="CAUSAL_LM",
        )
        theirs: Any = get_peft_model(base, config)
        start = [model.prompt_encoder["default"].embedding.weight for model in (ours, theirs)]
        assert start[0].equal(start[1])
        assert ours.active_peft_config.prompt_tuning_init_text == text


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_answers_of_a_batch_are_those_of_each_prompt_alone(method: str, material: Material) -> None:
    """Greedily by hand, without a cache, each prompt in plain PEFT's own forward pass."""
    section = plan_of(method, material).adapter
    base: Any = AutoModelForCausalLM.from_pretrained(material.model, dtype=torch.float32)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(3)  # so that answers differ
    base.generation_config.eos_token_id = None
    torch.manual_seed(0)
    model: Any = IN_FRONT[method].adapted(base).eval()
    model.generation_config = base.generation_config
    prompts = [torch.randint(3, 250, (length,)).tolist() for length in (9, 4, 17, 9)]
    tokenizer: Any = AutoTokenizer.from_pretrained(material.model)

    def by_hand(prompt: list[int]) -> str:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)

    can_pad = adapting(section).can_pad
    answers = write_answers(model, tokenizer, prompts, max_new_tokens=6, batch_size=4, can_pad=can_pad)
    assert [answer.text for answer in answers] == [by_hand(prompt) for prompt in prompts]
    assert len({*answers}) > 1


@pytest.mark.parametrize("method", IN_FRONT)
def test_the_base_is_kept_for_another_adapter_as_it_was(method: str, material: Material) -> None:
    plan, kept = plan_of(method, material), KeptBase()
    load_model(plan.model, plan.adapter, device=CPU, seed=0, kept=kept)
    lora: Any = TypeAdapter(Adapter).validate_python({"method": "lora", "rank": 2})
    base = kept._model and kept._model.get_base_model()
    again: Any = load_model(plan.model, lora, device=CPU, seed=0, kept=kept)
    assert again.get_base_model() is base
    fresh: Any = load_model(plan.model, lora, device=CPU, seed=0)
    assert {name for name, one in again.named_parameters() if one.requires_grad} == {
        name for name, one in fresh.named_parameters() if one.requires_grad
    }
    assert logits(again.eval()).equal(logits(fresh.eval()))


def test_documents_alone_in_their_rows_learn_the_same(material: Material) -> None:
    """As models do whose documents cannot share a row: the model lays its virtual tokens in front of each row."""
    plan = plan_of("prompt_tuning", material)
    row = adapting(plan.adapter)
    model: Any = load_model(plan.model, plan.adapter, device=CPU, seed=0).eval()
    (first, *_) = batches_of_rank(plan)(0)
    ends = first.cumulative_lengths.tolist()
    seen = row.in_front(plan.adapter, first)
    packed = BatchLoss(plan, model).of_each_target(model, first)
    lone = BatchLoss(plan.model_copy(update={"model": plan.model.model_copy(update={"packs": False})}), model)
    losses = []
    for start, end in pairwise(ends):
        is_own = (first.target_positions >= start) & (first.target_positions < end)
        document = replace(
            first,
            input_ids=first.input_ids[:, start:end],
            position_ids=first.position_ids[:, start:end],
            cumulative_lengths=torch.tensor([0, end - start], dtype=torch.int32),
            max_document_length=end - start,
            target_positions=first.target_positions[is_own] - start,
            target_ids=first.target_ids[is_own],
        )
        losses.append(lone.of_each_target(model, document))
    assert seen.num_tokens == first.num_tokens + 5 * (len(ends) - 1)
    torch.testing.assert_close(torch.cat(losses), packed, rtol=0, atol=1e-5)
