"""`raytune generate` before anything is started: what models are asked of rows, what is refused, and where answers go."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model

import raytune
from raytune.config.sections.data import DataSource
from raytune.data.rows.shards import Tally
from raytune.data.templates.text import resolve_template
from raytune.errors import DataError, UserError
from raytune.evaluation.asked_rows import AskedRow, Prompter, TooLong, read_asked_rows
from raytune.evaluation.sampling import sampling_plan
from raytune.launch.asking.generate import HowToAnswer, ToAnswer, generate, prepare_answers
from raytune.launch.asking.models_to_ask import Named
from raytune.launch.data.rows_to_score import sources_of
from tests.tiny import save_tiny_model, tiny_model, tiny_tokenizer

POSITIONS = 64
USER, SYSTEM = {"role": "user", "content": "Who?"}, {"role": "system", "content": "Be kind."}
ANSWER = {"role": "assistant", "content": "Ana."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a base of few positions, one without a template, and adapters."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "base", max_position_embeddings=POSITIONS)
    bare = tiny_tokenizer()
    bare.chat_template = None
    tiny_model().save_pretrained(folder / "bare")
    bare.save_pretrained(folder / "bare")
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    for name, config in {"lora": lora, "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)}.items():
        adapted = get_peft_model(tiny_model(max_position_embeddings=POSITIONS), config)
        adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
        adapted.save_pretrained(str(folder / name))
    return folder


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def prepared(folder: Path, model: str, rows: Path, *, base_too: bool = False, **how: Any) -> ToAnswer:
    named = {"base": how.pop("base", None), "adapters": how.pop("adapters", None), "template": how.pop("template", "auto")}
    asked = Named(model=str(folder / model), **named)
    return prepare_answers(asked, sources_of([str(rows)], "auto", None), HowToAnswer(**how), base_too=base_too)


def read(rows: Path, **source: Any) -> tuple[list[AskedRow], Tally]:
    tally = Tally()
    return list(read_asked_rows([DataSource(path=str(rows), **source)], rows.parent, tally)), tally


@pytest.mark.parametrize(
    ("row", "asked", "expected", "source"),
    [
        ({"messages": [SYSTEM, USER]}, [SYSTEM, USER], None, {}),
        ({"messages": [USER, ANSWER]}, [USER], "Ana.", {}),
        ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER, USER], None, {}),
        ({"prompt": "Who?"}, [USER], None, {}),
        ({"prompt": "Who?", "completion": "Ana."}, [USER], "Ana.", {}),
        ({"question": "Who?"}, [USER], None, {"columns": {"prompt": "question"}}),
        ({"prompt": "Who?", "level": "hard"}, [USER], None, {"format": "prompt_completion"}),
        ({"instruction": "Who?", "system": "Be kind."}, [SYSTEM, USER], None, {}),
        ({"instruction": "Who?", "output": "Ana."}, [USER], "Ana.", {}),
        ({"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ana."}]}, [USER], "Ana.", {}),
        ({"messages": [USER, ANSWER | {"reasoning_content": "Hm"}]}, [USER], ANSWER | {"reasoning_content": "Hm"}, {}),
    ],
)
def test_rows_of_every_format_are_asked_without_the_answer_that_they_may_have(
    row: Any, asked: Any, expected: Any, source: dict[str, Any], tmp_path: Path
) -> None:
    (found,), tally = read(written(tmp_path / "rows.jsonl", row), **source)
    assert (list(found.messages), found.expected, found.text) == (asked, expected, None)
    assert str(found.origin) == f"{tmp_path}/rows.jsonl:1"
    assert tally.counts["bad"] == 0


def test_an_answer_is_needed_by_no_row_of_a_file_and_read_where_there_is_one(tmp_path: Path) -> None:
    rows, _ = read(written(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": "c"}))
    assert [row.expected for row in rows] == ["b", None]


def test_lines_of_text_are_turns_where_there_is_a_template_and_are_continued_where_there_is_none(
    folder: Path, tmp_path: Path
) -> None:
    rows = written(tmp_path / "prompts.txt", "Who?", "", "Why?")
    turns = prepared(folder, "base", rows)
    assert [prompt.turns for prompt in turns.prompts["base"].values()] == [(USER,), ({"role": "user", "content": "Why?"},)]
    assert [row.origin.line for row in turns.rows] == [1, 3]
    for plain in (prepared(folder, "bare", rows), prepared(folder, "base", rows, in_turns=False)):
        (prompts,) = plain.prompts.values()
        assert [(prompt.turns, bytes(prompt.ids)) for prompt in prompts.values()] == [("Who?", b"Who?"), ("Why?", b"Why?")]
    with pytest.raises(UserError, match=r"--system is a turn, and bare is asked without a chat template"):
        prepared(folder, "bare", rows, system="Be kind.")


def test_a_prompt_is_what_transformers_makes_of_the_turns() -> None:
    tokenizer = tiny_tokenizer()
    prompter = Prompter(tokenizer, resolve_template("auto", tokenizer), vocab=300, positions=None)
    for turns in ([USER], [SYSTEM, USER], [USER, ANSWER, USER]):
        wanted: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert list(prompter.prompt_ids(turns)) == wanted


def test_a_system_message_takes_the_place_of_those_of_the_rows(folder: Path, tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", {"messages": [SYSTEM, USER]}, {"messages": [USER]})
    found = prepared(folder, "base", rows, system="Be short.").prompts["base"]
    assert [prompt.turns for prompt in found.values()] == [({"role": "system", "content": "Be short."}, USER)] * 2


def test_rows_that_cannot_be_asked_are_said_with_file_and_line_and_the_others_are_asked(folder: Path, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "x" * POSITIONS}]}
    rows = written(tmp_path / "rows.jsonl", {"messages": [USER]}, "torn", {"messages": [ANSWER]}, long, {"messages": []})
    found = prepared(folder, "lora", rows, base_too=True)
    assert [list(prompts) for prompts in found.prompts.values()] == [[0], [0]]
    assert found.num_rows == 5
    assert [(one.model, one.place.removeprefix(f"{rows}:")[:22]) for one in found.refused] == [
        (None, "2: not JSON: Expecting"),
        (None, "3: is an answer to not"),
        (None, "5: 'messages' is an em"),
        ("base", "4: the prompt has 83 t"),
        ("lora", "4: the prompt has 83 t"),
    ]


def test_no_row_that_could_be_asked_is_an_error_that_says_why(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 not asked:\n.*rows.jsonl:1: is an answer to nothing(.|\n)*no row that could"):
        prepared(folder, "base", written(tmp_path / "rows.jsonl", {"messages": [ANSWER]}))
    with pytest.raises(DataError, match=r"these are turns, and the model has no chat template .*--template"):
        prepared(folder, "bare", written(tmp_path / "rows.jsonl", {"messages": [USER]}))
    with pytest.raises(UserError, match="fit no format"):
        prepared(folder, "base", written(tmp_path / "rows.jsonl", {"what": "Who?"}))


def test_an_answer_has_the_positions_that_its_prompt_and_virtual_tokens_leave(folder: Path, tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", *({"messages": [{"role": "user", "content": "x" * size}]} for size in (1, 20)))
    rooms = {
        name: [prompt.room for prompt in prepared(folder, name, rows, max_new_tokens=30).prompts[name].values()]
        for name in ("base", "prompt")
    }
    length = len(tiny_tokenizer().apply_chat_template([USER], add_generation_prompt=True, return_dict=False)) - len("Who?")  # pyright: ignore[reportArgumentType]
    assert rooms == {"base": [30, POSITIONS - length - 20], "prompt": [30, POSITIONS - length - 20 - 5]}
    tokenizer = tiny_tokenizer()
    exact = Prompter(tokenizer, "", vocab=300, positions=4)
    assert exact.room(exact.prompt_ids("abc"), 9) == 1
    with pytest.raises(TooLong, match="4 tokens, and the model has 4 positions"):
        exact.prompt_ids("abcd")


@pytest.mark.parametrize(
    ("model", "named", "alone", "with_base"),
    [
        ("lora", {}, ["lora"], ["base", "lora"]),
        ("base", {}, ["base"], ["base"]),
        ("base", {"adapters": {"a": "lora", "b": "prompt"}}, ["a", "b"], ["base", "a", "b"]),
        ("lora", {"adapters": {"b": "prompt"}}, ["lora", "b"], ["base", "lora", "b"]),
    ],
)
def test_the_base_below_others_is_asked_where_somebody_wants_it(
    folder: Path, tmp_path: Path, model: str, named: dict[str, Any], alone: list[str], with_base: list[str]
) -> None:
    rows = written(tmp_path / "rows.jsonl", {"prompt": "Who?"})
    placed: dict[str, Any] = {key: {name: str(folder / path) for name, path in value.items()} for key, value in named.items()}
    assert list(prepared(folder, model, rows, **placed).prompts) == alone
    assert list(prepared(folder, model, rows, base_too=True, **placed).prompts) == with_base


def test_a_file_that_is_there_and_what_was_begun_for_something_else_are_not_touched(folder: Path, tmp_path: Path) -> None:
    one = prepared(folder, "base", written(tmp_path / "rows.jsonl", {"prompt": "Who?"}))
    output = written(tmp_path / "answers.jsonl", "mine")
    with pytest.raises(UserError, match=r"answers.jsonl, which is there already"):
        generate(one, str(output))
    assert output.read_text() == "mine\n"
    begun = tmp_path / "other.jsonl.unfinished"
    begun.mkdir()
    (begun / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match=r"other.jsonl.unfinished holds answers to other rows, of other models, or"):
        generate(one, str(tmp_path / "other.jsonl"))


def test_how_to_draw_without_a_temperature_is_refused() -> None:
    assert sampling_plan(temperature=0.0, top_k=None, top_p=None, seed=1) is None
    with pytest.raises(UserError, match=r"top_p is 0\.9, but nothing is drawn"):
        sampling_plan(temperature=None, top_k=None, top_p=0.9, seed=0)


@pytest.mark.parametrize(
    "asked", [{"max_new_tokens": 0}, {"max_new_tokens": -1}, {"batch_size": 0}, {"num_beams": 0}, {"temperature": -1.0},
              {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": 1, "top_p": 0},
              {"temperature": 1, "top_p": 2}, {"temperature": 1, "top_k": 0}]
)  # fmt: skip
def test_numbers_that_no_answer_is_written_with_are_refused_in_python_too(folder: Path, asked: dict[str, Any]) -> None:
    name = list(asked)[-1]
    with pytest.raises(UserError, match=f"^{name} is {asked[name]}"):
        raytune.generate(folder / "base", prompts=["Who?"], **asked)
    if name not in ("batch_size", "num_beams"):
        with pytest.raises(UserError, match=f"^{name} is {asked[name]}"):
            raytune.chat(folder / "base", **asked)


def test_prompts_are_a_list_and_each_of_them_is_one(folder: Path) -> None:
    with pytest.raises(UserError, match="prompts is a text, expected a list"):
        raytune.generate(folder / "base", prompts="Who?")
    with pytest.raises(DataError, match=r"(?s)prompts:1: is a number.*prompts:2: is null.*prompts:3: the prompt has half"):
        raytune.generate(folder / "base", prompts=[5, None, "caf\udce9"])  # pyright: ignore[reportArgumentType]
