"""The embedded demo keeps its promises: honest splits, the same rows everywhere, a base that plain transformers can load."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from raytune.data.files.demo import INSTRUCTION, SPLIT_SHARES, demo_rows, echo_rows
from raytune.errors import DataError
from raytune.model.demo import answer_batch, demo_base_path, demo_config, demo_tokenizer, train_demo_base

ANSWERED_SPLITS = ("train", "validation", "test")


def test_rows_are_the_same_on_every_machine():
    assert [_question_and_answer(demo_rows(split, 1)[0]) for split in ANSWERED_SPLITS] == [
        ("78 towels went to Fastil in Rologoham. Reply in JSON.", '{"who":"Fastil","city":"Rologoham","qty":78,"item":"towel"}'),
        ("In Dubaholm, Nitu paid for 81 blue mugs. Reply in JSON.", '{"who":"Nitu","city":"Dubaholm","qty":81,"item":"mug"}'),
        ("Pubrer wants 48 stools sent to Stukeham. Reply in JSON.", '{"who":"Pubrer","city":"Stukeham","qty":48,"item":"stool"}'),
    ]


@pytest.mark.parametrize("split", SPLIT_SHARES)
def test_fewer_rows_are_a_prefix_and_another_seed_gives_others(split):
    assert demo_rows(split, 20) == demo_rows(split, 50)[:20]
    assert demo_rows(split, 20) != demo_rows(split, 20, seed=1)


def test_splits_share_no_name_and_no_city():
    words = {split: _capitalised_words(split) for split in SPLIT_SHARES}
    for split, others in ((split, set(SPLIT_SHARES) - {split}) for split in SPLIT_SHARES):
        assert not words[split] & set.union(*(words[other] for other in others))


@pytest.mark.parametrize("split", ANSWERED_SPLITS)
def test_answers_are_compact_json_whose_values_stand_in_the_sentence(split):
    for row in demo_rows(split, 500):
        question, answer = _question_and_answer(row)
        values = json.loads(answer)
        assert list(values) == ["who", "city", "qty", "item"]
        assert json.dumps(values, separators=(",", ":")) == answer
        assert all(str(value) in question for value in values.values())
        assert question.endswith(INSTRUCTION)


def test_the_base_was_never_shown_the_task():
    texts = [message["content"] for row in demo_rows("pretraining", 5000) for message in row["messages"]]
    assert not [text for text in texts if INSTRUCTION in text or re.search(r'^\{"\w+":', text)]


def test_an_unknown_split_is_refused_by_name():
    with pytest.raises(DataError, match=r"no split 'eval'.*train, validation, test"):
        demo_rows("eval", 1)


@given(st.text())
def test_any_text_survives_the_tokenizer(text):
    tokenizer = demo_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@given(st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"])))
def test_ids_are_the_bytes_of_the_text(text):
    assert demo_tokenizer()(text)["input_ids"] == list(text.encode())


def test_a_turn_of_the_assistant_ends_with_eos_and_only_it_is_a_target():
    tokenizer = AutoTokenizer.from_pretrained(demo_base_path())
    ids_BT, labels_BT = answer_batch(tokenizer, [_conversation("Who?", "Ines"), _conversation("How many lamps?", "98")])
    assert tokenizer.decode(ids_BT[0], skip_special_tokens=False).startswith(
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nInes<|im_end|>\n<pad>"
    )
    assert [tokenizer.decode(labels_T[labels_T >= 0]) for labels_T in labels_BT] == ["Ines<|im_end|>", "98<|im_end|>"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_packaged_tokenizer_is_the_one_we_build():
    packaged, built = AutoTokenizer.from_pretrained(demo_base_path()), demo_tokenizer()
    assert packaged.get_vocab() == built.get_vocab()
    assert packaged.chat_template == built.chat_template
    assert packaged.special_tokens_map == built.special_tokens_map


def test_the_packaged_base_is_small_and_free_of_pickles():
    files = [path for path in demo_base_path().iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors", ".md"}


def test_plain_transformers_loads_the_base_and_it_answers_questions_but_not_in_json():
    tokenizer = AutoTokenizer.from_pretrained(demo_base_path(), padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(demo_base_path())
    assert 500_000 <= model.num_parameters() <= 1_000_000
    assert len(tokenizer) == model.config.vocab_size <= 264
    assert model.config.max_position_embeddings >= 1024
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )

    rows = demo_rows("test", 20)
    sentences = [_question_and_answer(row)[0].removesuffix(INSTRUCTION) for row in rows]
    names = _answers(model, tokenizer, [sentence + "Who?" for sentence in sentences])
    assert sum(name == json.loads(_question_and_answer(row)[1])["who"] for name, row in zip(names, rows)) >= 18
    answers = _answers(model, tokenizer, [sentence + INSTRUCTION for sentence in sentences])
    assert not [answer for answer in answers if answer.startswith('{"who"')]


def test_making_the_base_is_deterministic_and_lowers_the_loss():
    first, second = _first_losses(), _first_losses()
    assert first == second
    assert len(first) == 5
    assert first[2] < first[0]


def test_echo_rows_repeat_their_question():
    assert all(question == f"Echo {answer}" for question, answer in map(_question_and_answer, echo_rows(100)))


def test_config_takes_overrides():
    assert demo_config(num_hidden_layers=1).num_hidden_layers == 1


def _first_losses() -> list[float]:
    torch.manual_seed(5)
    model = LlamaForCausalLM(demo_config(num_hidden_layers=1))
    return list(train_demo_base(model, num_echo_steps=3, num_steps=2, learning_rate=3e-2, seed=5))


def _answers(model: torch.nn.Module, tokenizer, questions: list[str]) -> list[str]:
    prompts = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids_BT = model.generate(**prompts, max_new_tokens=60)
    return tokenizer.batch_decode(ids_BT[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


def _capitalised_words(split: str) -> set[str]:
    """The invented words of a split's sentences: all that are capitalised and are not our templates' own."""
    ours = set(
        re.findall(
            r"[A-Z]\w*", "In Reply JSON Echo Who Where How What Put List Repeat January March April May June July August October"
        )
    )
    return {
        word
        for row in demo_rows(split, 2000)
        if not row["messages"][0]["content"].startswith("Echo")
        for message in row["messages"]
        for word in re.findall(r"\b[A-Z]\w*", message["content"])
    } - ours


def _conversation(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _question_and_answer(row: dict) -> tuple[str, str]:
    question, answer = row["messages"]
    return question["content"], answer["content"]
