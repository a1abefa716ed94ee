"""Claims about new tokens: how they are named, counted, tokenised and identified, and what is refused, with file and line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from raytune.config.load import config_from, load_config
from raytune.config.sections.model import ModelSection
from raytune.data.templates.text import resolve_template
from raytune.data.templates.tokenizers import open_tokenizer, tokenizer_fingerprint, vocabulary_of
from raytune.errors import UserError
from raytune.evaluation.generation import write_answers
from raytune.launch.check import check_run
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import Base, Preparation, prepare
from raytune.model.files.stopping import stopping_config
from raytune.plan.ahead import plan_ahead
from raytune.plan.identity.identity import differences, identity_of
from raytune.plan.model.shapes import ModelShape
from raytune.plan.strategies.new_tokens import Vocabulary, stored_vocabulary, with_new_tokens
from raytune.training.steps.loop import evaluating
from tests.tiny import save_tiny_model, tiny_model
from tests.unit.plan_cases import CPU, DEMO, LLAMA_3_8B, config, gpus, planned

TOOL = {"new_tokens": ["<tool>"]}


def with_tokens(shape: ModelShape, *tokens: str, known: int | None = None, **model: Any) -> ModelShape:
    """A shape with rows for tokens, whose tokenizer has as many tokens as it has rows, or `known`."""
    section = ModelSection.model_validate({"new_tokens": list(tokens)} | model)
    return with_new_tokens(shape, section, Vocabulary(known={}, next_number=shape.vocab if known is None else known))


# --- names


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ('["<a>", "<b>", "<a>"]', "names '<a>' twice"),
        ('["<a>", {token: "<a>", description: again}]', "names '<a>' twice"),
        ('[""]', "at least one character"),
        ('[" <a>"]', "white space"),
        ('["   "]', "at least one character"),
        ('[{token: "<a> "}]', "white space"),
        ('["a\\nb"]', "not printed"),
        ("[{description: a tool}]", "token"),
        ('[{token: "<a>", descripton: a tool}]', "description"),
        ("[3]", "3"),
    ],
)
def test_what_is_no_token_is_refused_with_its_line(written: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"name: a\nmodel:\n  base: demo\n  new_tokens: {written}\n")
    with pytest.raises(UserError, match=r"run\.yaml:4:") as refused:
        load_config([file])
    assert said in str(refused.value)


def test_a_text_alone_a_list_and_a_mapping_say_the_same() -> None:
    forms: list[Any] = ["<a>", ["<a>"], {"token": "<a>"}, [{"token": "<a>"}], [{"token": "<a>", "special": True}]]
    assert len({repr(ModelSection(new_tokens=form).new_tokens) for form in forms}) == 1


# --- counts


def test_rows_are_added_where_there_is_no_room_in_multiples_and_never_taken_away() -> None:
    assert [with_tokens(DEMO, "<a>", "<b>").vocab, with_tokens(DEMO, "<a>", "<b>").new_rows] == [DEMO.vocab + 2, 2]
    padded = with_tokens(DEMO, "<a>", "<b>", vocabulary_multiple=64)
    assert (padded.vocab, padded.added_rows, padded.new_rows) == (320, 320 - DEMO.vocab, 320 - DEMO.vocab)
    room = with_tokens(LLAMA_3_8B, "<a>", "<b>", known=128_000, vocabulary_multiple=100)
    assert (room.vocab, room.added_rows, room.new_rows) == (LLAMA_3_8B.vocab, 0, 2)
    partly = with_tokens(LLAMA_3_8B, "<a>", "<b>", "<c>", known=LLAMA_3_8B.vocab - 1)
    assert (partly.vocab, partly.added_rows, partly.new_rows) == (LLAMA_3_8B.vocab + 2, 2, 3)


@pytest.mark.parametrize("tied", [True, False])
def test_a_shape_with_rows_is_that_of_the_resized_model(tied: bool, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, tied=tied)
    base = Base.of(ModelSection.model_validate({"base": str(path), "new_tokens": ["<a>", "<b>"], "vocabulary_multiple": 8}))
    model = tiny_model(tied=tied)
    model.resize_token_embeddings(base.shape.vocab)
    assert base.shape.num_parameters == sum(one.numel() for one in model.parameters())


def test_the_plan_counts_rows_weights_and_state() -> None:
    shape = with_tokens(LLAMA_3_8B, "<a>", "<b>", "<c>")
    lora, alone = (planned(gpus(1), shape, model=TOOL, adapter={"method": method}) for method in ("lora", "trainable_tokens"))
    before = planned(gpus(1), LLAMA_3_8B, adapter={"method": "lora"})
    assert lora.num_trainable - before.num_trainable == alone.num_trainable == 2 * 3 * 4096
    assert lora.num_parameters - before.num_parameters == 2 * 3 * 4096
    assert lora.checkpoint_bytes - before.checkpoint_bytes == 12 * 2 * 3 * 4096
    whole = planned(gpus(1), shape, model=TOOL, adapter={"method": "lora", "modules_to_save": ["embed_tokens", "lm_head"]})
    assert whole.num_trainable - before.num_trainable == 2 * 4096 * shape.vocab
    named = planned(gpus(1), shape, model=TOOL, adapter={"method": "lora", "trainable_tokens": ["<a>", "x", "y"]})
    assert named.num_trainable - before.num_trainable == 2 * 5 * 4096
    assert any("are new to the model" in note for note in lora.notes)


def test_a_plan_ahead_counts_rows_of_a_base_that_is_not_here() -> None:
    sections: dict[str, Any] = {
        "model": {"base": "mistralai/Mistral-7B-v0.3", "new_tokens": ["<a>"], "vocabulary_multiple": 64},
        "data": {"train": "rows.jsonl"},
        "cluster": {"instance": "g6.xlarge"},
        "adapter": {"method": "qlora"},
    }
    plan = plan_ahead(config(**sections), 1_000_000)
    assert plan.model.num_embeddings == 32_768 + 64
    without = plan_ahead(config(**sections | {"model": {"base": "mistralai/Mistral-7B-v0.3"}}), 1_000_000)
    assert plan.num_parameters - without.num_parameters == 2 * 64 * 4096


@pytest.mark.parametrize("kind", ["demo", "word level", "unigram"])
def test_the_stored_vocabulary_numbers_tokens_as_the_library_does(kind: str, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path)
    if kind != "demo":
        vocab: Any = {"a": 0, "b": 1, "c": 2} if kind == "word level" else [["a", -1.0], ["b", -2.0], ["c", -3.0]]
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "a"} | (
            {"type": "Unigram", "unk_id": 0} if kind == "unigram" else {}
        )
        added = {"id": 7, "content": "<s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        text = json.dumps({"version": "1.0", "model": model, "added_tokens": [added | {"normalized": False}]})
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text)).save_pretrained(path)
    stored, opened = stored_vocabulary(ModelSection(base=str(path))), vocabulary_of(open_tokenizer(str(path)))
    assert stored is not None
    assert (stored.next_number, dict(stored.known)) == (opened.next_number, dict(opened.known))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<new>"])
    assert tokenizer.convert_tokens_to_ids("<new>") == opened.next_number


# --- what is refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an adapter without whole modules": ({"adapter": {"method": "ia3"}}, "nothing trains the new rows of .*embed_tokens"),
    "rows switched off": ({"adapter": {"method": "lora", "trainable_tokens": []}}, "nothing trains the new rows"),
    "the embedding alone, of a tied pair": (
        {"adapter": {"method": "ia3", "modules_to_save": ["embed_tokens"]}},
        "nothing trains the new rows of lm_head",
    ),
    "rows and a whole tied matrix": (
        {"adapter": {"method": "lora", "modules_to_save": ["lm_head"]}},
        "which parts it from the one that it is tied to",
    ),
    "frozen embeddings": ({"adapter": {"method": "full"}, "strategy": {"freeze": {"embeddings": True}}}, "model.new_tokens"),
    "frozen embeddings under rows": (
        {"adapter": {"method": "lora"}, "strategy": {"freeze": {"embeddings": True}}},
        "adapter.trainable_tokens trains rows",
    ),
    "the last layer only": ({"adapter": {"method": "full"}, "strategy": {"freeze": {"train_only": ["layers.1"]}}}, "new rows"),
    "an update of the embedding": (
        {"adapter": {"method": "lora", "target_modules": ["q_proj", "embed_tokens"]}},
        "adapter.target_modules takes in model.embed_tokens",
    ),
    "noise on embeddings": ({"adapter": {"method": "lora"}, "training": {"neftune_noise_alpha": 5.0}}, "neftune"),
    "a name twice": ({"adapter": {"method": "lora", "trainable_tokens": ["a", "a"]}}, "names 'a' twice"),
    "rows of what is trained whole": (
        {"adapter": {"method": "lora", "trainable_tokens": ["a"], "modules_to_save": ["embed_tokens", "lm_head"]}},
        "rows are trained already",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_nothing_trains_or_two_things_do_are_refused_with_the_way_out(name: str) -> None:
    sections, said = REFUSED[name]
    with pytest.raises(UserError, match=said) as refused:
        planned(shape=with_tokens(DEMO, "<tool>"), model=TOOL, **sections)
    assert any(word in str(refused.value).lower() for word in ("set ", "leave", "name "))


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"method": "full"}},
        {"adapter": {"method": "full"}, "strategy": {"freeze": {"first_layers": 1}}},
        {"adapter": {"method": "ia3", "modules_to_save": ["embed_tokens", "lm_head"]}},
        {"adapter": {"method": "qlora"}},
        {"adapter": {"method": "trainable_tokens"}},
        {"adapter": {"method": "lora"}, "strategy": {"freeze": {"train_only": ["layers.1", "embeddings"]}}},
    ],
)
def test_what_trains_them_is_planned(sections: dict[str, Any]) -> None:
    plan = planned(shape=with_tokens(DEMO, "<tool>"), model=TOOL, **sections)
    assert plan.model.new_tokens[0].token == "<tool>"
    assert plan.model.num_embeddings == DEMO.vocab + 1


def test_an_evaluation_asks_nothing_of_rows_that_zero_3_has_divided() -> None:
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]}, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), config)
    for name, parameter in model.named_parameters():
        if "trainable_tokens" in name:
            parameter.data = torch.empty(0)  # as it lies between two passes
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training


WAYS_OUT: dict[str, tuple[dict[str, Any], str]] = {
    "a method without whole modules": (
        {"adapter": {"method": "prompt_tuning"}},
        r"start\. Set adapter.method to lora or trainable_tokens",
    ),
    "rows switched off": ({"adapter": {"method": "lora", "trainable_tokens": []}}, "or leave out adapter.trainable_tokens"),
    "one matrix of a tied pair": (
        {"adapter": {"method": "lora", "modules_to_save": ["embed_tokens"]}},
        r"to \[embed_tokens, lm_head\]; or leave out adapter.modules_to_save",
    ),
    "layers alone": (
        {"adapter": {"method": "full"}, "strategy": {"freeze": {"train_only": ["layers.1"]}}},
        "To train them, name `embeddings` and `head` in strategy.freeze.train_only",
    ),
    "phases that never reach the embedding": (
        {
            "adapter": {"method": "full"},
            "training": {"max_steps": 4},
            "strategy": {"unfreeze": [{"last_layers": 1}, {"from_step": 1, "last_layers": 2}]},
        },
        "To train them, add a phase of last_layers: all to strategy.unfreeze",
    ),
    "rows that train_only leaves out": (
        {"adapter": {"method": "lora"}, "strategy": {"freeze": {"train_only": ["layers.1"]}}},
        r"Name it in strategy.freeze.train_only\.",
    ),
}


@pytest.mark.parametrize("name", WAYS_OUT)
def test_the_way_out_of_untrained_rows_is_one(name: str) -> None:
    sections, said = WAYS_OUT[name]
    with pytest.raises(UserError, match=said):
        planned(shape=with_tokens(DEMO, "<tool>"), model=TOOL, **sections)


def test_a_method_of_rows_without_tokens_is_refused() -> None:
    with pytest.raises(UserError, match=r"no token whose rows .* model.new_tokens"):
        planned(adapter={"method": "trainable_tokens"})


def run_yaml(folder: Path, model: str, adapter: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(
        f"name: a\nstorage: {folder}\nmodel:\n  base: demo\n  {model}\ndata:\n  train: {{path: 'demo:train', max_rows: 4}}\n"
        f"adapter:\n  method: lora\n  {adapter}\n"
    )
    return file


@pytest.mark.parametrize(
    ("model", "adapter", "said"),
    [
        ("new_tokens: [<a>, <|im_end|>]", "rank: 4", r"names '<\|im_end\|>', which is a token of demo already, number 258"),
        ("new_tokens: [<a>]", "trainable_tokens: [JSON]", r"names 'JSON', which is 4 tokens"),
        ("new_tokens: [<a>]", "trainable_tokens: [' ']", r"names ' ', which the vocabulary writes as"),
    ],
)
def test_check_refuses_tokens_that_are_there_and_rows_of_tokens_that_are_not(
    model: str, adapter: str, said: str, tmp_path: Path
) -> None:
    found = check_run(load_config([run_yaml(tmp_path, model, adapter)]))
    assert len(found.errors) == 1
    assert found.errors[0].keys[0].startswith(("model.new_tokens", "adapter.trainable_tokens"))
    with pytest.raises(UserError, match=said):
        raise found.errors[0]


# --- tokens


def prepared(storage: Path, **model: Any) -> Any:
    resolved = config_from(
        {
            "name": "a",
            "storage": str(storage),
            "model": {"base": "demo"} | model,
            "data": {"train": {"path": "demo:train", "max_rows": 20}, "max_length": 512},
            "adapter": {"method": "full"},
            "training": {"max_steps": 2},
            "cluster": {"workers": 1},
        }
    )
    return prepare(resolved, this_machine(resolved.cluster), map).plan


def test_a_store_of_other_tokens_is_not_used_and_a_run_with_them_is_another(tmp_path: Path) -> None:
    plans = [prepared(tmp_path, new_tokens=tokens) for tokens in ([], ["Reply in JSON."], [{"token": "<never>"}])]
    assert len({plan.data.train.path for plan in plans}) == 3
    assert plans[0].data.train.num_tokens > plans[1].data.train.num_tokens
    assert plans[0].data.train.num_tokens == plans[2].data.train.num_tokens
    described = prepared(tmp_path, new_tokens=[{"token": "<never>", "description": "nothing"}])
    assert described.data.train.path == plans[2].data.train.path, "a description changes no token"
    changed = differences(identity_of(plans[2]), identity_of(described))
    assert {key.partition(".")[0] for key in changed} == {"model"}
    assert not differences(identity_of(plans[1]), identity_of(prepared(tmp_path, new_tokens="Reply in JSON.")))


def test_trials_prepared_by_one_preparation_have_their_own_tokens(tmp_path: Path) -> None:
    preparation = Preparation(CPU, map)
    stores = []
    for tokens in ([], ["Reply in JSON."], []):
        sections: dict[str, Any] = {"name": "a", "storage": str(tmp_path), "model": {"base": "demo", "new_tokens": tokens}}
        resolved = config_from(
            sections | {"data": {"train": {"path": "demo:train", "max_rows": 9}}, "adapter": {"method": "full"}}
        )
        plan = preparation.prepare(resolved).plan
        stores.append((plan.data.train.num_tokens, plan.model.num_embeddings))
    assert stores[0] == stores[2] != stores[1]


def test_turn_ends_of_a_template_that_were_no_tokens_before_end_answers(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path)
    tokens = ModelSection(new_tokens=["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]).new_tokens
    tokenizer = open_tokenizer(str(path), new_tokens=tokens)
    stops = stopping_config(tiny_model().generation_config, tokenizer, resolve_template("llama-3", tokenizer))
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in (stops.eos_token_id or [])
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(open_tokenizer(str(path)))


@pytest.mark.parametrize("keeps", [True, False])
def test_answers_keep_new_tokens_and_leave_other_special_ones_out(keeps: bool, tmp_path: Path) -> None:
    tokenizer: Any = open_tokenizer(str(save_tiny_model(tmp_path)), new_tokens=ModelSection(new_tokens=["<tool>"]).new_tokens)
    model: Any = tiny_model()
    model.resize_token_embeddings(len(tokenizer))
    script = tokenizer("a<tool>b<pad><|im_start|>c")["input_ids"]
    model.generate = answering(script)
    (answer,) = write_answers(model, tokenizer, [[1, 2]], max_new_tokens=8, batch_size=1, kept=["<tool>"] if keeps else [])
    assert answer.text == ("a<tool>bc" if keeps else "abc")


def answering(ids: list[int]) -> Callable[..., Any]:
    """What a model would write, whatever it is asked."""

    def generate(prompts: Any, **_: Any) -> Any:
        return prompts.new_tensor([[*prompts[0].tolist(), *ids]])

    return generate
