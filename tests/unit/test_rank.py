"""What `raytune data rank` asks, in which order it puts rows, and what it refuses; tests/ray has its way through a cluster."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.config.sections.data import DataSource
from raytune.data.conversations.conversation import Origin
from raytune.data.conversations.masking import trained_turns
from raytune.data.conversations.shaping import AS_IT_IS, Shape
from raytune.data.formats.recognising import AS_MESSAGES, read_row
from raytune.errors import UserError
from raytune.evaluation.scored_rows import ScoredRow
from raytune.launch.asking.generate import AnsweredRow
from raytune.launch.asking.rank import Ranking, as_asked, as_pair, rank, ranked_rows
from raytune.launch.asking.score import RunToScore, run_to_score
from raytune.launch.state.record import RunRecord, write_plan
from raytune.run_folder import RunFolder
from tests.tiny import tiny_plan

ASKED = AnsweredRow(
    model="tuned",
    file="rows.jsonl",
    row=3,
    prompt=({"role": "user", "content": "Who?"},),
    answer="Me.",
    finish="stop",
    tokens=2,
    prompt_tokens=5,
)


def test_only_the_models_own_answer_carries_loss() -> None:
    turns = [("system", "S"), ("user", "A?"), ("assistant", "a"), ("user", "B?")]
    prompt = tuple({"role": role, "content": text} for role, text in turns)
    pair = as_pair(replace(ASKED, prompt=prompt, answer="b", tools=[{"type": "function", "function": {"name": "f"}}]))
    row = read_row(pair, AS_MESSAGES, Origin("pairs.jsonl", 1))
    assert trained_turns(row.messages, "assistant") == [4]
    assert row.messages[4]["content"] == "b"
    assert row.tools == [{"type": "function", "function": {"name": "f"}}]
    assert as_pair(replace(ASKED, prompt="Once"))["messages"][0] == {"role": "user", "content": "Once"}


@given(st.lists(st.floats(0, 20), min_size=1, max_size=30), st.randoms())
def test_the_least_certain_come_first_and_of_equal_ones_the_earlier(losses: list[float], chance: Any) -> None:
    answers = [replace(ASKED, row=number) for number in range(len(losses))]
    scores = [ScoredRow(file="pairs", row=number + 1, targets=1, loss=loss) for number, loss in enumerate(losses)]
    chance.shuffle(scores)
    ranked = ranked_rows(answers, scores)
    wanted = sorted(range(len(losses)), key=lambda number: (-losses[number], number))
    assert [(row.asked.row, row.uncertainty) for row in ranked] == [(number, losses[number]) for number in wanted]


def test_a_row_without_a_score_is_counted_and_not_ranked() -> None:
    answers = [replace(ASKED, row=1), replace(ASKED, row=2)]
    ranked = ranked_rows(answers, [ScoredRow(file="pairs", row=2, targets=3, loss=0.5)])
    assert [row.asked.row for row in ranked] == [2]
    ranking = Ranking(run="r", output="o", rows=tuple(ranked), num_rows=3, num_ranked=1, mean=0.5)
    assert "1 of 3 rows ranked by uncertainty; 2 could not be asked or scored" in ranking.lines[0]
    assert ranked[0].to_json() == {
        "uncertainty": 0.5,
        "file": "rows.jsonl",
        "row": 2,
        "prompt": [{"role": "user", "content": "Who?"}],
        "answer": "Me.",
        "finish": "stop",
    }


def finished(folder: Path, *, template: str = "{{ messages }}", targets: str = "assistant") -> RunToScore:
    run = RunFolder(str(folder), "tiny")
    config = {"name": "tiny", "storage": str(folder), "data": {"train": "demo:train", "targets": targets}}
    RunRecord(name="tiny", state="finished", attempts=1, created=time.time(), config=config, versions={}).write(run)
    write_plan(run, tiny_plan(storage=str(folder)).model_copy(update={"template": template}))
    return run_to_score(run.path)


def test_an_answer_is_scored_behind_the_prompt_that_it_was_written_to(tmp_path: Path) -> None:
    """Whatever a run makes of its training rows: its system prompt is in the template that the model is asked in."""
    run = finished(tmp_path, targets="last")
    changed = {"system": "S", "max_turns": 1, "reasoning": "none", "train_empty_thought": False, "too_long": "truncate"}
    trained = replace(run, config=run.config.model_copy(update={"data": run.config.data.model_copy(update=changed)}))
    data = as_asked(trained).config.data
    assert Shape.of(data) == AS_IT_IS
    assert (data.too_long, data.train_empty_thought, data.targets) == ("drop", True, "last")


def test_what_cannot_be_ranked_is_refused_before_anything_starts(tmp_path: Path) -> None:
    rows, output = [DataSource(path="demo:test")], str(tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=r"trained on plain text: there are no answers .* `raytune score` ranks texts"):
        rank(finished(tmp_path / "text", template=""), rows, top=1, output=output)
    with pytest.raises(UserError, match=r"trains whole texts \(data.targets: all\)"):
        rank(finished(tmp_path / "all", targets="all"), rows, top=1, output=output)
    Path(output).write_text("mine")
    with pytest.raises(UserError, match=r"out.jsonl, which is there already"):
        rank(finished(tmp_path / "there"), rows, top=1, output=output)
    assert Path(output).read_text() == "mine"
