"""`raytune data reword`: which rows are asked about, what becomes of answers, and that made rows lie where their origins do."""

import csv
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import raytune
from raytune.config.load import config_from
from raytune.config.sections.data import DataSection, DataSource
from raytune.config.sections.split import SplitSection
from raytune.data.conversations.conversation import Conversation, Origin, RowError
from raytune.data.files.source_files import find_files
from raytune.data.files.sources import scan
from raytune.data.formats.origins import MADE_BY, ORIGIN
from raytune.data.formats.recognising import AS_MESSAGES, read_row
from raytune.data.rows.rewording import RowToReword, Written, turns_to_reword, versions_of
from raytune.data.rows.shards import Tally
from raytune.data.rows.source_rows import read_conversations
from raytune.data.rows.split import Split, place_of, side_of
from raytune.data.store.borders import measured
from raytune.errors import DataError, UserError
from raytune.evaluation.sampling import sampling_plan
from raytune.launch.asking.generate import HowToAnswer
from raytune.launch.asking.models_to_ask import Named, models_to_ask
from raytune.launch.asking.reword import HowToReword, ToReword, prepare_rewording
from raytune.launch.data.data_check import check_data
from raytune.launch.data.data_preview import preview_data
from raytune.launch.planning import plan_run
from raytune.plan.data.split import asked_split
from tests.tiny import PATIENT, save_tiny_model

ASK = "In other words: {content}"
USER, ANSWER = {"role": "user", "content": "Who is she?"}, {"role": "assistant", "content": "Ana."}


def written(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row, default=str)}\n" for row in rows))
    return path


def to_reword(row: Mapping[str, Any], *parts: Any, chat: Sequence[Any] | None = None) -> RowToReword:
    turns = chat or row.get("messages") or [USER | {"content": str(row["text"]) or "?"}, ANSWER]
    conversation = read_row({"messages": turns, "tools": row.get("tools")}, AS_MESSAGES, Origin("rows.jsonl", 7))
    return RowToReword(values=row, conversation=conversation, turns=turns_to_reword(conversation, parts or ("user",)))


def made_of(row: Mapping[str, Any], words: str = "Otherwise.", chat: Sequence[Any] | None = None) -> dict[str, Any]:
    """What is made of a row by a model that says the same to everything."""
    reworded = to_reword(row, chat=chat)
    answer = dict.fromkeys(reworded.turns, Written(words, has_ended=True))
    (made,) = versions_of(reworded, [answer], (), {"model": "m", "ask": ASK})
    assert not isinstance(made, str)
    return dict(made)


def versions(row: RowToReword, *answers: str | Written) -> list[Any]:
    texts = [Written(one, has_ended=True) if isinstance(one, str) else one for one in answers]
    return [*versions_of(row, [dict.fromkeys(row.turns, one) for one in texts], ("<eos>",), {"model": "m", "ask": ASK})]


# --- Where made rows lie -----------------------------------------------------------------------------------------------------

VALUES = st.one_of(st.integers(0, 3), st.text("ab", min_size=1, max_size=2))
ROW = st.fixed_dictionaries(
    {
        "text": st.text("abcä ", min_size=1, max_size=3).filter(str.strip),
        "user": VALUES,
        "label": st.sampled_from("abc"),
        "meta": st.fixed_dictionaries({"at": st.integers(0, 9)}),
    }
)
SHARES = st.floats(0.01, 0.49)
BY = st.sampled_from([{}, {"group": "user"}, {"strata": "label"}, {"group": "text", "strata": "text"}, {"time": "meta.at"}])
HELD_OUT = st.one_of(
    st.builds(lambda validation, test: {"validation_fraction": validation, "test_fraction": test}, SHARES, SHARES),
    st.builds(lambda index: {"fold": {"index": index, "of": 3}, "test_fraction": 0.2}, st.integers(0, 2)),
)


def split_of(folder: Path, data: DataSection, *files: Path) -> Split | None:
    """None where a side would have no row, or folds are asked for by time, which is refused."""
    try:
        return measured(asked_split(data), [DataSource(path=str(file)) for file in files], folder / "stores")[0]
    except DataError as error:
        if "leaves no row for" not in str(error):
            raise
        return None


def lines_on(side: Any, file: Path, split: Split) -> set[int]:
    """Lines of a file that are on a side, as the code reads them that builds stores."""
    source, tally = DataSource(path=str(file), format="messages", columns={"messages": "messages"}), Tally()
    found = {row.origin.line for row in read_conversations(source, file.parent, tally, side, split)}
    assert tally.counts["bad"] == 0
    return found


@settings(PATIENT, max_examples=60)
@given(rows=st.lists(ROW, min_size=2, max_size=25), by=BY, held_out=HELD_OUT)
def test_what_is_made_of_a_row_is_trained_where_that_is_and_measured_nowhere(
    rows: list[Any], by: dict[str, str], held_out: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    if "time" in by and "fold" in held_out:
        held_out = {"validation_fraction": 0.3}
    rows = [row | {"messages": [USER, ANSWER]} for row in rows]
    originals, made = written(folder / "rows.jsonl", rows), written(folder / "made.jsonl", [made_of(row) for row in rows])
    data = DataSection.model_validate({"split": by} | held_out)
    split = split_of(folder, data, originals)
    if split is None:
        return
    assert split_of(folder, data, originals, made) == split, "rows that are made move no border"
    trained = lines_on("train", originals, split)
    assert lines_on("train", made, split) == trained
    assert lines_on("validation", made, split) == lines_on("test", made, split) == set()
    assert lines_on("all", made, split) == set(range(1, len(rows) + 1))


TYPED = [
    {
        "text": f"row {number}",
        "at": datetime(2026, 1, 1 + number, 9, 30, 0, 250_000 + number, UTC),
        "day": date(2026, 1, 1 + number),
        "price": Decimal("1.50") + number,
        "raw": bytes([number]),
        "none": None,
        "of": [{"id": number, "no": None}],
    }
    for number in range(12)
]


@pytest.mark.parametrize("unit", ["us", "ns"])
@pytest.mark.parametrize("by", [{}, {"time": "at"}, {"time": "day"}, {"group": "day"}, {"group": "price"}, {"strata": "of"}])
def test_rows_of_typed_files_keep_their_place_in_the_text_that_carries_them(
    by: dict[str, str], unit: Any, tmp_path: Path
) -> None:
    types = {"at": pa.timestamp(unit, "UTC")}
    table = pa.Table.from_pylist(TYPED)
    table = table.set_column(table.schema.get_field_index("at"), "at", table["at"].cast(types["at"]))
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rows = [row for row, _ in values_of(tmp_path / "rows.parquet")]
    assert isinstance(rows[0]["at"], datetime)
    made = [made_of(row) for row in rows]
    section = SplitSection.model_validate(by)
    pyarrow.parquet.write_table(pa.Table.from_pylist(made), tmp_path / "made.parquet")
    with (tmp_path / "made.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, made[0])
        table.writeheader()
        table.writerows([{name: one if isinstance(one, str) else json.dumps(one) for name, one in row.items()} for row in made])
    for path in (written(tmp_path / "made.jsonl", made), tmp_path / "made.parquet", tmp_path / "made.csv"):
        assert [place_of(row, section) for row, _ in values_of(path)] == [place_of(row, section) for row in rows]


def values_of(path: Path) -> list[tuple[Any, int]]:
    from raytune.data.files.readers import BadRow, read_segment

    (file,) = find_files(DataSource(path=str(path)), path.parent)
    rows = [row for segment in scan(file, None).segments for row in read_segment(segment)]
    return [(row.values, row.line) for row in rows if not isinstance(row, BadRow)]


def test_a_row_that_was_joined_with_made_ones_in_a_table_lies_where_it_did() -> None:
    row = {"text": "a"}
    by = SplitSection()
    assert place_of(row | {ORIGIN: None, MADE_BY: None}, by) == place_of(row | {ORIGIN: "", MADE_BY: ""}, by) == place_of(row, by)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({ORIGIN: None}, "was made of another row .* is empty, which tells on which side"),
        ({ORIGIN: '{"text":"a'}, "'raytune_origin' is damaged"),
        ({ORIGIN: "[]"}, "'raytune_origin' is a list, expected a row"),
        ({ORIGIN: {"text": "a"}}, "'raytune_origin' is an object, expected a row as JSON in a text"),
        ({ORIGIN: '{"text":"a"}'}, r"the row that it was made of: has no 'user', only 'text' \(data.split.group\)"),
    ],
)
def test_a_made_row_whose_side_cannot_be_told_is_a_bad_row(changes: dict[str, Any], message: str) -> None:
    split = Split(by=SplitSection(group="user"), bands={"": (("validation", 0, 1),)})
    row = made_of({"text": "a", "user": 1})
    assert side_of(row, split) == "train"
    with pytest.raises(RowError, match=message):
        side_of(row | changes, split)


# --- What is made of answers -------------------------------------------------------------------------------------------------


def test_nothing_but_the_chosen_turns_gets_other_words() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"who": "Ana"}}}
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        USER,
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "Ana", "tool_call_id": "1"},
        {"role": "assistant", "content": "<think>Hm</think>It is Ana."},
        USER,
        {"role": "assistant", "content": "Ana.", "reasoning_content": "Hm"},
        {"role": "user", "content": " "},
        {"role": "assistant", "content": "Yes.", "weight": 0.5},
        {"role": "user", "content": "And he?"},
        {"role": "assistant", "content": "Bo.", "train": False},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"messages": turns, "tools": tools, "id": 3}
    for parts, wanted in {
        ("system",): [0],
        ("user",): [1, 5, 9],
        ("assistant",): [8, 10],
        ("user", "assistant"): [1, 5, 8, 9, 10],
    }.items():
        asked = to_reword(row, *parts)
        assert [*asked.turns] == wanted
        (made,) = versions(asked, " Other words.\n")
        assert made["messages"] == [
            turn | {"content": "Other words."} if number in wanted else turn for number, turn in enumerate(turns)
        ]
        assert made["tools"] == tools
        assert json.loads(made[ORIGIN]) == row
        assert made[MADE_BY] == {"model": "m", "ask": ASK, "row": "rows.jsonl:7", "version": 1}
        again = read_row(made, AS_MESSAGES, asked.conversation.origin)
        assert again.messages == tuple(made["messages"])
        assert again.unread_columns == (), "no format misses them"


def test_a_plain_document_becomes_another(tmp_path: Path) -> None:
    row = {"text": "A fox.", "url": "u"}
    conversation = Conversation(text="A fox.", origin=Origin("rows.jsonl", 7))
    assert turns_to_reword(conversation, ("user", "assistant")) == ()
    made = versions(
        RowToReword(values=row, conversation=conversation, turns=turns_to_reword(conversation, ("text",))), "One fox."
    )
    made_by = {"model": "m", "ask": ASK, "row": "rows.jsonl:7", "version": 1}
    assert made == [{"text": "One fox.", ORIGIN: '{"text":"A fox.","url":"u"}', MADE_BY: made_by}]
    source = DataSource(path=str(written(tmp_path / "made.jsonl", made)))
    assert [row.text for row in read_conversations(source, tmp_path, Tally())] == ["One fox."]


def test_answers_that_are_no_other_words_are_dropped_for_a_reason() -> None:
    row = to_reword({"messages": [USER, ANSWER]})
    found = versions(
        row,
        "Tell me who she is",
        Written("Tell me who", has_ended=False),
        " \n",
        "<think>Let me see.</think>\n",
        "Who is  she?\n",
        "Who?<eos>",
        "Who?<|im_end|>",
        "Who? ### Response:",
        "Tell me who she is ",
        "<think>Let me see.</think>\nWho might she be?",
    )
    kept = [one["messages"][0]["content"] if isinstance(one, dict) else one for one in found]
    assert kept == [
        "Tell me who she is",
        "cut",
        *("empty", "empty"),
        "unchanged",
        *("control", "control", "control"),
        "repeated",
        "Who might she be?",
    ]
    assert [one[MADE_BY]["version"] for one in found if isinstance(one, dict)] == [1, 10]
    marked = to_reword({"messages": [USER | {"content": "What is USER: for?"}, ANSWER]})
    assert not isinstance(versions(marked, "What does USER: mean?")[0], str), "it is what the row is about"
    assert [*versions_of(row, [{}], (), {})] == ["not asked"]


def test_a_version_is_kept_whole_or_not_at_all() -> None:
    row = to_reword({"messages": [USER, ANSWER, USER, ANSWER]}, "user", "assistant")
    words = {turn: Written(f"words {turn}", has_ended=True) for turn in range(4)}
    assert [*versions_of(row, [words | {3: Written("", has_ended=True)}], (), {})] == ["empty"]
    same = words | {1: Written("Ana.", has_ended=True)}
    (made,) = versions_of(row, [same], (), {})
    assert [turn["content"] for turn in made["messages"]] == ["words 0", "Ana.", "words 2", "words 3"]  # pyright: ignore[reportArgumentType, reportCallIssue]


# --- Which rows are asked about ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=256)


def config(folder: Path, **data: Any) -> Any:
    rows = [
        {"prompt": f"say {n}", "completion": str(n), "patient": n % 20, "created": f"2026-01-{n % 28 + 1:02d}"} for n in range(60)
    ]
    source = {"path": str(written(folder / "rows.jsonl", rows)), "format": "prompt_completion"}
    sections = {"storage": str(folder / "runs"), "model": {"base": "demo"}, "training": {"max_steps": 2}}
    return config_from(sections | {"data": {"train": source, "packing": "none", "max_length": 256} | data})


def prepared(asked: Any, model: Path, **how: Any) -> ToReword:
    answering = HowToAnswer(sampling=sampling_plan(temperature=how.pop("temperature", None), top_k=None, top_p=None, seed=0))
    how = {"ask": ASK, "answering": answering} | how
    return prepare_rewording(asked, models_to_ask(Named(model=str(model))), HowToReword(**how))


def asked_lines(found: ToReword) -> list[int]:
    return [row.origin.line for row in found.to_answer.rows]


@pytest.mark.parametrize(
    "held_out",
    [
        {},
        {"validation_fraction": 0.2, "test_fraction": 0.2},
        {"validation_fraction": 0.2, "split": {"group": "patient"}},
        {"validation_fraction": 0.2, "split": {"strata": "created"}},
        {"validation_fraction": 0.2, "test_fraction": 0.1, "split": {"time": "created"}},
        {"fold": {"index": 1, "of": 3}},
    ],
)
def test_only_what_a_run_trains_on_is_asked_about(held_out: dict[str, Any], model: Path, tmp_path: Path) -> None:
    asked = config(tmp_path, **held_out)
    found = prepared(asked, model)
    report = plan_run(asked).data_report
    assert report is not None
    assert len(found.rows) == report.train.sources[0].used
    split, _ = measured(asked_split(asked.data), asked.data.train, tmp_path)
    wanted = [line for row, line in values_of(tmp_path / "rows.jsonl") if side_of(row, split) == "train"]
    assert asked_lines(found) == wanted
    assert [row.text for row in found.to_answer.rows] == [f"In other words: say {line - 1}" for line in wanted]
    assert sum(found.not_asked.values()) + len(found.rows) == found.num_read == 60


def test_rows_of_validation_files_rows_that_were_made_and_rows_without_words_are_counted_and_not_asked_about(
    model: Path, tmp_path: Path
) -> None:
    rows: list[Any] = [{"messages": [USER | {"content": f"Who is {n}?"}, ANSWER], "id": n} for n in range(6)]
    rows[1]["messages"] = [{"role": "user", "content": " "}, ANSWER]
    rows[2] = made_of(rows[0])
    rows[3] = "torn"
    train, held_out = written(tmp_path / "a.jsonl", rows), written(tmp_path / "held_out.jsonl", rows[4:5])
    asked = config(tmp_path, train=str(train), validation=str(held_out), on_bad_row="skip")
    found = prepared(asked, model)
    assert asked_lines(found) == [1, 6]
    assert found.not_asked == {"measured": 1, "of_others": 1, "wordless": 1, "bad": 1}
    with pytest.raises(DataError, match=r"1 row cannot be used:\n.*a.jsonl:4: not JSON"):
        prepared(config(tmp_path, train=str(train)), model)
    with pytest.raises(DataError, match=r"There is no row to reword: of 60 rows 60 without words of a part"):
        prepared(config(tmp_path), model, parts=("system",))


def test_a_limit_draws_rows_and_a_larger_one_keeps_them(model: Path, tmp_path: Path) -> None:
    asked = config(tmp_path, validation_fraction=0.2)
    few, more = (set(asked_lines(prepared(asked, model, limit=limit))) for limit in (10, 25))
    assert (len(few), len(more)) == (10, 25)
    assert few < more < set(asked_lines(prepared(asked, model)))
    assert few != set(asked_lines(prepared(asked, model, limit=10, seed=1))) != set(range(1, 11))
    assert prepared(asked, model, limit=10).not_asked["beyond"] == len(prepared(asked, model).rows) - 10


def test_each_version_and_turn_is_a_prompt_of_its_own_and_a_row_that_cannot_be_asked_whole_is_not_asked(
    model: Path, tmp_path: Path
) -> None:
    long = USER | {"content": "x" * 300}
    train = written(tmp_path / "a.jsonl", [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER, long, ANSWER]}])
    found = prepared(config(tmp_path, train=str(train)), model, parts=("user", "assistant"), per_row=2, temperature=1.0)
    assert [row.text for row in found.to_answer.rows[:4]] == [ASK.format(content=text) for text in ("Who is she?", "Ana.") * 2]
    (prompts,) = found.to_answer.prompts.values()
    assert [*prompts] == [0, 1, 2, 3], "the short turns of the second row are not asked either"
    assert len(found.to_answer.refused) == 2
    assert found.to_answer.refused[0].place.startswith(f"{train}:2: the prompt has ")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"ask": "Say it otherwise"}, r"--ask must have \{content\} once"),
        ({"per_row": 2}, "2 versions of a row would all be the likeliest answer"),
        ({"parts": ("user", "text")}, "a file has rows of one kind"),
        ({"parts": ("tool",)}, "--part is 'tool', expected one of system, user, assistant, text"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_what_cannot_be_asked_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HowToReword(**({"ask": ASK} | how))


# --- What a run makes of them ------------------------------------------------------------------------------------------------


def with_made(folder: Path, **data: Any) -> Any:
    """The config with a file of rows that were made of all of its own."""
    asked = config(folder, **data)
    made = [made_of(row, f"other words for {row['prompt']}", chat_of(row)) for row, _ in values_of(folder / "rows.jsonl")]
    (source,) = asked.data.train
    sources = [source.model_dump(exclude_defaults=True), str(written(folder / "made.jsonl", made))]
    return config_from(asked, [f"data.train={json.dumps(sources)}"])


def chat_of(row: Mapping[str, Any]) -> list[Any]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def test_a_run_trains_on_both_and_says_what_it_left_out(tmp_path: Path) -> None:
    plan = plan_run(with_made(tmp_path, validation_fraction=0.2, test_fraction=0.1, split={"group": "patient"}))
    report = plan.data_report
    assert report is not None
    rows, made = report.train.sources
    assert (rows.made, made.made) == (0, 60)
    assert made.used == rows.used > 0
    assert made.origin_held_out == rows.other_side + rows.test_side > 0
    assert made.used + made.origin_held_out == made.rows == 60
    assert made.unread_columns == {}
    assert [*report.validation] == ["rows"], "no set of its own for what is measured nowhere"
    assert report.validation["rows"].total("used") == rows.other_side
    assert report.test["rows"].total("used") == rows.test_side
    lost = f"{made.origin_held_out} rows of 60 rows made of held-out rows: neither trained nor measured"
    assert f"training (made): {lost}" in str(report)
    assert "training (made): 60 rows of 60 rows made of others by a model" in str(report)
    without = plan_run(config(tmp_path, validation_fraction=0.2, test_fraction=0.1, split={"group": "patient"}))
    assert without.data_report is not None
    assert without.data_report.train.sources[0].other_side == rows.other_side


def test_previews_and_checks_show_what_rows_were_made_of(tmp_path: Path) -> None:
    asked = with_made(tmp_path, validation_fraction=0.2)
    assert check_data(asked).to_json()["report"]["train"]["sources"][1]["made"] == 60
    shown = preview_data(asked, rows=60, source="made")
    assert shown.documents[0].made_by == "rows.jsonl:7 by m"
    assert "; made of rows.jsonl:7 by m" in str(shown)
    (lost,) = shown.lost
    assert lost == f"made: {60 - len(shown.documents)} rows made of others that are held out, and so not trained"


def test_made_rows_are_not_measured_and_not_trained_where_a_file_holds_out_their_origin(tmp_path: Path) -> None:
    asked = with_made(tmp_path)
    made = str(tmp_path / "made.jsonl")
    with pytest.raises(DataError, match=r"60 rows of data.validation were made by a model of training rows"):
        plan_run(config(tmp_path, validation=made))
    held_out = written(tmp_path / "held_out.jsonl", [row for row, _ in values_of(tmp_path / "rows.jsonl")][40:42])
    for key in ("validation", "test"):
        changed = config_from(asked, [f"data.{key}={{path: {held_out}, format: prompt_completion}}"])
        with pytest.raises(DataError, match=rf"made.jsonl:41 was made of a row that data.{key} holds"):
            plan_run(changed)
    other = written(tmp_path / "other.jsonl", [{"prompt": "say x", "completion": "x"}])
    assert plan_run(config_from(asked, [f"data.validation={other}"])).data_report is not None


@pytest.mark.parametrize("by", ["strata", "time"])
def test_borders_are_not_drawn_without_the_rows_that_they_are_of(by: str, tmp_path: Path) -> None:
    asked = with_made(tmp_path, validation_fraction=0.2, split={by: "created"})
    assert plan_run(asked).data_report is not None
    alone = config_from(asked, [f"data.train={tmp_path / 'made.jsonl'}"])
    with pytest.raises(DataError, match=rf"All training rows were made of others .*List the rows .* leave out data.split.{by}"):
        plan_run(alone)


def test_a_model_that_is_not_there_is_no_fault_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"storage: {tmp_path}\nmodel: {{base: demo}}\ndata: {{train: demo:train}}\n")
    with pytest.raises(UserError, match=r"^nowhere is neither a run nor a model"):
        raytune.data_reword(tmp_path / "run.yaml", model="nowhere", ask=ASK, output=tmp_path / "o.jsonl")
