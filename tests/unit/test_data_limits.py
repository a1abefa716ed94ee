"""Rows of which too many are lost or trained otherwise than they should stop a run before it begins, unless that is waived."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

import raytune
from raytune.cli import cli
from raytune.config.load import config_from
from raytune.config.sections.data import DataSection, DataSource
from raytune.config.sections.data_limits import LimitsSection
from raytune.config.sections.run import RunConfig
from raytune.data.store.build import build_store
from raytune.data.store.store import StoreInfo
from raytune.data.templates.tokenizers import open_tokenizer, tokenizer_fingerprint
from raytune.errors import DataError, UserError
from raytune.launch.data.data_check import data_builder
from raytune.launch.data.prepare import Base
from raytune.launch.planning import plan_run
from raytune.plan.data.data_limits import RULES, Verdict, refuse_exceeded, verdicts_of
from raytune.plan.data.data_report import SourceReport
from raytune.plan.data.row_lengths import LONGEST, added, bucket_of, length_lines, length_of_share
from raytune.plan.facts.data_facts import DataFacts
from raytune.plan.identity.identity import identity_of
from tests.tiny import tiny_request, tiny_store, tiny_tokenizer

SHORT = "who is it, and why is it?"
QUESTION = "How many towels went to Fastil in Rologoham?"


def chat(question: str = "Q", answer: str = "A", **last: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer} | last]}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def config(folder: Path, rows: Path | str, **data: Any) -> RunConfig:
    return config_from(
        {
            "model": {"base": "demo"},
            "name": "gate",
            "storage": str(folder),
            "data": {"train": str(rows), "max_length": 64, "template": "chatml"} | data,
        }
    )


def built(folder: Path, rows: Path | str, **data: Any) -> DataFacts:
    run = config(folder, rows, **data)
    return data_builder(run, Base.of(run.model), map).build()


def fine(number: int) -> list[dict[str, Any]]:
    return [chat(f"Q{index}", f"A{index}") for index in range(number)]


# --- Each limit ----------------------------------------------------------------------------------------------------------------

Fault = Callable[[int], Any]
FAULTS: dict[str, tuple[Fault, dict[str, Any], str]] = {
    "no_target": (lambda _: chat(weight=0), {}, "have no target"),
    "cut": (lambda _: chat("Q", "A" * 100), {}, "lose trained tokens behind data.max_length"),
    "blank_answers": (lambda _: chat("Q", " \n"), {}, "a trained answer, or a text, that is empty"),
    "prompt_trained": (lambda _: chat(SHORT, f"{SHORT} he is, he is, he is"), {}, "have their question trained"),
    "lost": (lambda _: "{", {"on_bad_row": "skip"}, "are not trained at all"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_stops_above_a_limit_and_not_at_it(name: str, tmp_path: Path) -> None:
    fault, settings, words = FAULTS[name]
    settings = {"max_length": 96, **settings}
    path = write(tmp_path / "rows.jsonl", [*fine(15), *(fault(index) for index in range(5))])
    others = dict.fromkeys(LimitsSection.model_fields, 1.0)
    with pytest.raises(DataError, match=words) as refused:
        built(tmp_path, path, limits=others | {name: 0.24}, **settings)
    lines = str(refused.value).splitlines()
    assert lines[0].startswith("training (rows): 5 of 20 rows (25 %) ")
    assert lines[0].endswith(f"more than 24 % (data.limits.{name}):")
    assert [line.split(":")[1] for line in lines[1:6]] == ["16", "17", "18", "19", "20"]
    assert lines[6].endswith(f"If it is as it should be, set data.limits.{name} to 0.25.")
    assert lines[7] == f"`raytune data preview CONFIG --row {path}:16` shows how the first one is trained."
    assert refused.value.keys == (f"data.limits.{name}",)
    built(tmp_path, path, limits=others | {name: 0.25}, **settings)


@pytest.mark.parametrize("name", FAULTS)
def test_the_usual_limits_stop_a_fifth_of_faulty_rows(name: str, tmp_path: Path) -> None:
    fault, settings, _ = FAULTS[name]
    path = write(tmp_path / "rows.jsonl", [*fine(16), *(fault(index) for index in range(4))])
    with pytest.raises(DataError, match=rf"data\.limits\.{name}"):
        built(tmp_path, path, **{"max_length": 96, **settings})


def test_rows_whose_answers_do_not_end_are_refused_and_those_of_a_fitting_template_are_not(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", fine(4))
    with pytest.raises(DataError, match=r"4 of 4 rows \(100 %\) end in a target that is no special token.*limits\.unending"):
        built(tmp_path, path, template="llama-3", max_length=256)  # its <|eot_id|> is only text to this tokenizer
    built(tmp_path, path, template="chatml")


def test_chats_that_are_given_as_plain_text_are_refused_and_other_texts_are_not(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [{"text": f"### Human: {index}\n### Assistant: {index}"} for index in range(3)])
    with pytest.raises(DataError, match=r"3 of 3 rows .* have their question trained") as refused:
        built(tmp_path, path)
    assert "a chat as plain text: '### Human:' and '### Assistant:'" in str(refused.value)
    texts = ["### Assistant: before ### Human: behind", "a book about [INST]", "Human: a play\nAssistant: with names"]
    assert built(tmp_path, write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])).report


def test_an_answer_that_begins_with_its_question_is_a_fault_only_if_more_than_that_question_is_trained(tmp_path: Path) -> None:
    rows = [chat(QUESTION, QUESTION), chat(QUESTION, f"{QUESTION}!"), chat("Q", "Q and a good deal more than that")]
    rows += [chat(QUESTION, "17 towels"), chat(f"Correct it: {QUESTION}", f"{QUESTION} And so on and on.")]
    (source,) = tiny_store(tmp_path, str(write(tmp_path / "fine.jsonl", rows)), max_rows=None).report.sources
    assert source.prompt_trained == 0
    path = write(tmp_path / "a.jsonl", [chat(QUESTION, f"{QUESTION} 78 towels, as it says.")])
    for targets, count in (("assistant", 1), ("last", 1), ("all", 0), (("user", "assistant"), 0)):
        (source,) = tiny_store(tmp_path, str(path), max_rows=None, targets=targets).report.sources
        assert source.prompt_trained == count, targets


def with_bos(folder: Path) -> str:
    """The demo's tokenizer with a token that begins texts."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    number = tokenizer.convert_tokens_to_ids("<|im_start|>")
    begins = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", number)])  # pyright: ignore[reportArgumentType]
    tokenizer.backend_tokenizer.post_processor = begins
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_beginning_that_rows_or_a_template_write_twice_is_refused(tmp_path: Path) -> None:
    model = with_bos(tmp_path / "tokenizer")

    def store(rows: list[Any], **changes: Any) -> StoreInfo:
        path, fingerprint = write(tmp_path / "rows.jsonl", rows), tokenizer_fingerprint(open_tokenizer(model))
        request = tiny_request(str(path), max_rows=None, tokenizer_fingerprint=fingerprint, **changes)
        return build_store(request, tokenizer_path=model, folder=tmp_path / "stores")

    def refused(info: StoreInfo) -> bool:
        found = {verdict.rule.name: verdict for verdict in verdicts_of({"training": info.report}, DataSection())}
        return found["double_bos"].is_exceeded

    assert refused(store([{"text": "<|im_start|>one"}, {"text": "two"}]))
    assert not refused(store([{"text": "one"}, {"text": "two"}]))
    once = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    assert not refused(store(fine(2), template=once))
    assert refused(store(fine(2), template="{{ bos_token }}" + once))


# --- The gate ------------------------------------------------------------------------------------------------------------------


def test_a_store_that_is_found_passes_the_gate_too_and_is_the_same_with_and_without_limits(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*fine(3), chat(weight=0)])
    waived = {"no_target": 1, "lost": 1}
    first = built(tmp_path, path, limits=waived)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "stores").rglob("*")}
    with pytest.raises(DataError, match=r"data\.limits\.no_target"):
        built(tmp_path, path)
    assert built(tmp_path, path, limits={"no_target": 0.3, "lost": 0.3}).train == first.train
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "stores").rglob("*")} == before
    plans = [plan_run(config(tmp_path, path, limits=limits)) for limits in (waived, {"no_target": 0.3, "lost": 0.3})]
    assert identity_of(plans[0]) == identity_of(plans[1])


def test_all_limits_that_are_exceeded_are_told_at_once_source_by_source(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [*fine(3), chat(weight=0)])
    other = write(tmp_path / "other.jsonl", [*fine(3), chat("Q", "")])
    held_out = write(tmp_path / "held.jsonl", [*fine(2), chat("Q", "A" * 200)])
    with pytest.raises(DataError) as refused:
        built(tmp_path, "", train=[str(one), str(other)], validation=str(held_out))
    told = [line.split(":")[0] for line in str(refused.value).splitlines() if line.endswith("):")]
    assert told == ["training (one)", "training (one)", "training (other)", "validation (held)"]
    assert refused.value.keys == ("data.limits.lost", "data.limits.no_target", "data.limits.blank_answers", "data.limits.cut")


@pytest.mark.parametrize(
    ("split", "held_out"),
    [
        ({"validation_fraction": 0.02}, "validation"),
        ({"test_fraction": 0.02}, "test"),
        ({"fold": {"index": 0, "of": 50}}, "validation"),
    ],
    ids=["validation", "test", "fold"],
)
def test_what_a_split_holds_out_is_not_judged_by_rows_of_the_other_side(
    split: dict[str, Any], held_out: str, tmp_path: Path
) -> None:
    """A torn line lies on both sides, and would be most of the smaller one."""
    path = write(tmp_path / "rows.jsonl", [*fine(97), "{", "[", "1"])
    facts = built(tmp_path, path, on_bad_row="skip", **split)
    assert facts.report is not None
    (source,) = getattr(facts.report, held_out)[held_out].sources
    assert source.bad > 0.1 * (source.rows - source.other_side - source.test_side)


def test_a_check_names_the_key_in_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*fine(3), chat(weight=0)])
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {{base: demo}}\nstorage: {tmp_path}\ndata:\n  train: {path}\n  template: chatml\n  limits:\n    lost: 0.1\n"
    )
    answer = CliRunner().invoke(cli, ["check", str(run)])
    assert answer.exit_code == 2
    assert f"{run}:7:" in answer.stderr
    assert "1 of 4 rows (25 %) are not trained at all" in answer.stderr
    fits = ["data.limits.lost=0.25", "data.limits.no_target=0.25"]
    assert CliRunner().invoke(cli, ["check", str(run), *fits]).exit_code == 0


def test_a_check_that_saw_the_first_rows_only_says_what_would_stop_a_run_and_refuses_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*[chat(weight=0)] * 150, *fine(1900)])
    typed = ["check", "model.base=demo", f"data.train={path}", f"storage={tmp_path}", "data.max_length=64"]
    answer = CliRunner().invoke(cli, typed)
    assert answer.exit_code == 0, answer.output
    told = "a run stops if all rows are as these: data.train (rows): 150 of 2000 rows (7.5 %) have no target, more than 5 %"
    assert told in answer.stdout


def test_there_is_a_rule_for_each_limit_and_a_count_for_each_rule() -> None:
    names = {rule.name for rule in RULES}
    assert {rule.key for rule in RULES} >= {f"data.limits.{name}" for name in LimitsSection.model_fields}
    assert names - set(SourceReport.model_fields) == {"lost"}


def test_healthy_rows_are_far_from_every_limit(tmp_path: Path) -> None:
    found = verdicts_of({"training": tiny_store(tmp_path, max_rows=200).report}, DataSection())
    assert len(found) == len(RULES) - 1, "data.too_long asks for nothing"
    assert {verdict.share for verdict in found} == {0.0}
    refuse_exceeded(found)


def test_a_share_of_nothing_exceeds_no_limit() -> None:
    verdict = Verdict(rule=RULES[0], use="training", source="s", count=0, of=0, limit=0.0, examples=(), most=0)
    assert not verdict.is_exceeded


# --- Lengths -------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 1 << 34), min_size=1, max_size=60), st.integers(1, 100))
def test_a_length_that_is_read_off_counts_is_too_high_by_less_than_half(lengths: list[int], percent: int) -> None:
    counts = [0] * (1 + max(map(bucket_of, lengths)))
    for length in lengths:
        counts[bucket_of(length)] += 1
        assert length <= LONGEST[bucket_of(length)] <= 1.5 * length
    exact = sorted(lengths)[-(-percent * len(lengths) // 100) - 1]  # that percent of the rows have at most
    assert exact <= length_of_share(counts, percent / 100) <= 1.5 * exact
    assert sum(int(line.split()[3]) for line in length_lines(counts)) == len(lengths)
    assert sum(added([counts, counts[:3]])) == len(lengths) + sum(counts[:3])


def test_every_row_that_became_tokens_is_in_the_histogram_at_its_full_length(tmp_path: Path) -> None:
    rows = [*(chat("Q", "A" * length) for length in (1, 10, 100, 1000)), chat(weight=0)]
    sources = (DataSource(path=str(write(tmp_path / "a.jsonl", rows))),)
    for too_long in ("truncate", "drop", "split"):
        (source,) = tiny_store(tmp_path, sources=sources, max_length=64, too_long=too_long).report.sources
        assert sum(source.lengths) == source.used + source.no_target + source.cut_off + source.dropped == 5
        whole = tiny_store(tmp_path, sources=sources, max_length=4096).report.sources[0]
        assert source.lengths == whole.lengths
        assert len(source.lengths) == 1 + bucket_of(tiny_store(tmp_path, sources=sources, max_length=4096).longest_document)


# --- data check ----------------------------------------------------------------------------------------------------------------


def test_a_data_check_reports_what_would_stop_a_run_and_leaves_the_store_that_the_run_finds(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*fine(16), chat(weight=0), "{", "["])
    run = tmp_path / "run.yaml"
    run.write_text(f"name: r\nmodel: {{base: demo}}\nstorage: {tmp_path}\ndata: {{train: {path}, max_length: 64}}\n")
    answer = CliRunner().invoke(cli, ["data", "check", str(run)])
    assert answer.exit_code == 2
    assert "STOPS  bad             2 of 19 rows" in answer.stdout
    assert f"  {path}:18: not JSON" in answer.stdout
    assert "tokens, before data.max_length" not in answer.stderr
    facts = json.loads(CliRunner().invoke(cli, ["data", "check", str(run), "--json"]).stdout)
    assert [one["rule"] for one in facts["verdicts"] if one["is_exceeded"]] == ["bad", "lost", "no_target"]
    assert facts["ok"] is False
    made = set((tmp_path / "stores").iterdir())
    waived = {"on_bad_row": "skip", "limits": {"lost": 0.5, "no_target": 0.5}}
    found = raytune.data_check(run, data=waived)
    assert not found.is_refused
    assert found.report == raytune.make_plan(run, data=waived).data_report
    assert set((tmp_path / "stores").iterdir()) == made, "one tokenisation for all of them"
    with pytest.raises(UserError, match="2 rows cannot be used"):
        raytune.make_plan(run)


def test_a_data_check_of_the_first_rows_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*fine(8), "{"])
    run = config(tmp_path / "runs", path)
    found = raytune.data_check(run, max_rows=5)
    assert found.report.train.total("rows") == 5
    assert "Looked at the first 5 rows of each source; a run may train on them." in str(found)
    assert not (tmp_path / "runs").exists()
