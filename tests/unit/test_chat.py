"""Conversations: what is said stays in order, models change under it, and what a person types does what it says."""

import asyncio
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import raytune
from raytune.cli import cli
from raytune.cli.terminal import converse
from raytune.config.sections.data import DataSource
from raytune.data.rows.shards import Tally
from raytune.data.rows.source_rows import read_conversations
from raytune.errors import UserError
from raytune.evaluation.generation import without_position_warnings
from raytune.printable import printable
from raytune.serving.talk import Command, Style, Talk, meaning, path_in
from tests.terminal import Terminal
from tests.tiny import save_tiny_model, tiny_model, tiny_tokenizer

LIMIT = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "base", tied=False, max_position_embeddings=256)
    adapters: dict[str, Any] = {
        "lora": LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False),
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "ia3": IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
        ),
    }
    for seed, (name, config) in enumerate(adapters.items()):
        torch.manual_seed(seed)
        adapted = get_peft_model(tiny_model(tied=False, max_position_embeddings=256), config)
        adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
        adapted.save_pretrained(str(folder / name))
    return folder


def plain_answer(folder: Path, name: str, messages: list[dict[str, str]]) -> str:
    """What plain transformers and PEFT answer, the likeliest token each time."""
    tokenizer: Any = tiny_tokenizer()
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base")
    if name != "base":
        model = PeftModel.from_pretrained(model, str(folder / name))
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    with without_position_warnings():
        written = model.eval().generate(
            input_ids=torch.tensor([ids]), max_new_tokens=LIMIT, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    return tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)


@pytest.fixture
def chat(folder: Path) -> Iterator[Any]:
    adapters = {"front": str(folder / "prompt")}
    with raytune.chat(folder / "lora", adapters=adapters, max_new_tokens=LIMIT) as chat:
        yield chat


def test_each_model_answers_the_whole_conversation_as_plain_transformers_does(chat: Any, folder: Path) -> None:
    assert (list(chat.models), chat.model) == (["base", "lora", "front"], "lora")
    messages: list[dict[str, str]] = []
    for name, kept_as in (("lora", "lora"), ("base", "base"), ("front", "prompt"), ("base", "base"), ("lora", "lora")):
        chat.use(name)
        messages.append({"role": "user", "content": f"And {name}?"})
        wanted = plain_answer(folder, kept_as, messages)
        pieces = list(chat.stream(f"And {name}?"))
        assert "".join(pieces) == wanted, name
        messages.append({"role": "assistant", "content": wanted})
        assert chat.messages == messages
    with pytest.raises(UserError, match="no model 'other' here: base, lora, front"):
        chat.use("other")


def test_what_was_read_of_an_answer_stays_and_a_question_without_answer_goes(chat: Any) -> None:
    answer = chat.stream("Who?")
    read = next(answer)
    answer.close()
    assert chat.messages == [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": read}]
    assert chat.last is None
    before = chat.messages
    with pytest.raises(UserError, match=r"lora cannot be asked that: the prompt has 3\d\d tokens, and .* 256 positions"):
        chat.ask("x" * 300)
    assert chat.messages == before


@pytest.mark.parametrize("kept_as", ["ia3", "lora"])
def test_who_asks_on_ends_an_answer_that_was_left_and_gets_that_of_the_model_that_is_asked(folder: Path, kept_as: str) -> None:
    with raytune.chat(folder / kept_as, max_new_tokens=LIMIT) as chat:
        tuned = chat.model
        wanted = {name: plain_answer(folder, name, [{"role": "user", "content": "Who?"}]) for name in ("base", kept_as)}
        assert wanted["base"] != wanted[kept_as]
        for left, asked in (("base", tuned), (tuned, "base")):
            chat.use(left)
            answer = chat.stream("Who?")
            next(answer)
            assert chat.messages == []
            chat.reset()
            chat.use(asked)
            assert chat.ask("Who?") == wanted["base" if asked == "base" else kept_as]
            said = chat.messages
            assert list(answer) == [], "it has ended"
            assert chat.messages == said
            assert "".join(chat.retry()) == wanted["base" if asked == "base" else kept_as]
            chat.reset()
        answer = chat.stream("Who?")
        read = next(answer)
        chat.ask("And why?")
        assert [turn["content"] for turn in chat.messages][:3] == ["Who?", read, "And why?"]


def test_another_answer_takes_the_place_of_the_last_one(chat: Any) -> None:
    chat.style = Style(max_new_tokens=LIMIT, temperature=2.0)
    chat.system = "Be kind."
    first = chat.ask("Who?")
    again = "".join(chat.retry())
    assert first != again
    assert chat.messages[1:] == [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": again}]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be kind."}]
    with pytest.raises(UserError, match="Nothing was asked yet"):
        chat.retry()


def test_a_saved_conversation_is_a_row_that_training_reads(chat: Any, tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    with pytest.raises(UserError, match="Nothing was said"):
        chat.save(str(file))
    chat.system = "Be kind."
    chat.ask("Who? é😀\nTwo lines")
    for _ in range(2):
        chat.save(str(file))
    rows = list(read_conversations(DataSource(path=str(file)), tmp_path, tally := Tally()))
    assert [list(row.messages) for row in rows] == [chat.messages] * 2
    assert tally.counts["bad"] == 0


def test_a_chat_works_in_a_notebook_whose_event_loop_runs(folder: Path) -> None:
    async def cell() -> tuple[str, list[str]]:
        with raytune.chat(str(folder / "base"), max_new_tokens=LIMIT) as chat:
            return chat.ask("Who?"), list(chat.stream("Why?"))

    whole, pieces = asyncio.run(cell())
    assert whole == plain_answer(folder, "base", [{"role": "user", "content": "Who?"}])
    assert pieces


def test_a_model_without_a_template_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tiny_model().save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"bare has no chat template.*--template"):
        raytune.chat(tmp_path / "bare")


# --- Values ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "means"),
    [
        (" Who? ", "Who?"),
        ("", ""),
        ("/model a", Command("/model", "a")),
        ("/system  Be kind. ", Command("/system", "Be kind.")),
        ("/quit", Command("/quit", "")),
        ('"""\n/etc/hosts\n\nis what?\n"""', "/etc/hosts\n\nis what?"),
        ('"""one"""', "one"),
    ],
)
def test_a_line_is_a_command_or_a_turn(typed: str, means: Command | str) -> None:
    assert meaning(typed) == means


def test_what_looks_like_a_command_and_is_none_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UserError, match=r"no command /sytem: /model .*between \"\"\""):
        meaning("/sytem x")
    with pytest.raises(UserError, match="Name one file"):
        path_in("a b.jsonl")
    assert path_in("'a b.jsonl'") == "a b.jsonl"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("heat=1", "no setting 'heat': max_new_tokens, temperature"),
        ("temperature=hot", "temperature is 'hot', expected 0 or more"),
        ("temperature=-1", "expected 0 or more"),
        ("temperature=nan", "expected 0 or more"),
        ("top_p=0", "expected a share in 0..1"),
        ("max_new_tokens=none", "max_new_tokens is 'none', expected a number of tokens"),
    ],
)
def test_a_setting_that_is_none_is_refused(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Style().changed(text)


def test_settings_change_together_and_say_when_they_do_nothing() -> None:
    style = Style().changed("temperature=0.7 top_k=40")
    assert style == Style(temperature=0.7, top_k=40)
    assert style.sampling is not None
    cold = style.changed("temperature=0")
    assert cold.sampling is None
    assert str(cold).endswith("top_k=40  seed=0  (nothing is drawn at temperature 0)")
    assert cold.changed("top_k=none") == Style()


def test_a_conversation_is_a_value() -> None:
    talk = Talk(system="S").asked("a").answered("b")
    assert talk.asked("c").turns[:2] == talk.turns
    assert talk.without_last_answer() == Talk(system="S").asked("a")


# --- The terminal ------------------------------------------------------------------------------------------------------------


def test_lines_of_standard_input_are_turns_and_answers_go_to_standard_output(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["Who?", "/model base", '"""', "Two", "lines", '"""', "/save chat.jsonl", "/nothing", "Unheard"]
    arguments = ["chat", str(folder / "lora"), "--max-new-tokens", str(LIMIT)]
    done = CliRunner().invoke(cli, arguments, input="\n".join(lines))
    assert done.exit_code == 2
    assert "There is no command /nothing" in done.stderr
    messages = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert [turn["content"] for turn in messages[::2]] == ["Who?", "Two\nlines"]
    assert messages[1]["content"] == plain_answer(folder, "lora", messages[:1])
    assert messages[3]["content"] == plain_answer(folder, "base", messages[:3])
    assert done.stdout == "".join(f"{printable(turn['content'])}\n" for turn in messages[1::2])


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as Python opens it with a locale, and without
def test_bytes_that_are_no_text_end_a_conversation_in_words(chat: Any, monkeypatch: pytest.MonkeyPatch, errors: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors))
    with pytest.raises(UserError, match="What is asked is not UTF-8: byte 0xe9"):
        converse(chat)
    assert chat.messages == []


def test_half_a_character_is_refused_in_words(chat: Any) -> None:
    with pytest.raises(UserError, match=r"half of a surrogate pair \(\\udce9\)"):
        chat.ask("caf\udce9")
    assert chat.messages == []


@pytest.mark.slow
def test_ctrl_c_ends_an_answer_and_ctrl_d_the_conversation_at_a_real_terminal(folder: Path, tmp_path: Path) -> None:
    terminal = Terminal("chat", str(folder / "base"), "--max-new-tokens", "100000", cwd=tmp_path)

    def type_in(keys: str) -> None:
        terminal.wait_for("base> ", 120)  # what comes before is the terminal's, not that of who reads lines
        terminal.press(keys)

    type_in("Who?\n")
    assert "Loading" not in terminal.wait_for("tokens: the model has no positions left: /reset")
    for line in ("/reset\n", "/set max_new_tokens=5\n", "Why?\n"):
        type_in(line)
    terminal.wait_for("(cut after 5 tokens: max_new_tokens)")
    type_in("half a line")
    terminal.wait_for("half a line")
    terminal.rest()  # Python hears of a signal that comes while readline begins to wait with the next key alone
    terminal.press("\x03")
    type_in("/save chat.jsonl\n")
    terminal.wait_for("Appended to chat.jsonl.")
    type_in("\x04")
    assert terminal.end() == 0
    (row,) = (tmp_path / "chat.jsonl").read_text().splitlines()
    question, _ = json.loads(row)["messages"]
    assert question["content"] == "Why?"
