"""A scored row has the loss that plain transformers and PEFT give it, whatever was trained and however it is divided."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from raytune.config.load import config_from
from raytune.config.sections.data import DataSource
from raytune.errors import CheckpointError, UserError
from raytune.evaluation.scored_rows import ScoredRow, read_jsonl_table
from raytune.launch.asking.score import standing_alone
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.base_here import refuse_changed_base
from raytune.launch.data.rows_to_score import as_text, sources_of, tokenised
from raytune.launch.data.stores import store_plan_of
from raytune.launch.state.result import RunResult
from raytune.plan.data.data_report import StoreReport
from raytune.plan.run_plan import RunPlan
from raytune.plan.scoring import Weights, scoring_plan
from raytune.run_folder import RunFolder
from raytune.storage import read_bytes
from raytune.training.start.start import Worker
from raytune.training.tasks import perform
from tests.numerics.processes import run_on_ranks
from tests.numerics.runs import rank_and_world
from tests.numerics.saved_models import plainly_loaded
from tests.numerics.test_whole_run import LORA, config, finished
from tests.tiny import save_tiny_model, tiny_rows
from tests.variants import variants

NEW = [{"token": '","city":"', "description": "city"}, "Reply in JSON."]
VARIANTS: dict[str, dict[str, Any]] = {
    "full, chunked loss": {"adapter": {"method": "full"}, "training": {"loss": "chunked"}},
    "lora": {"adapter": LORA},
    "dora": {"adapter": LORA | {"use_dora": True}},
    "pissa": {"adapter": LORA | {"init": "pissa"}},
    "eva": {"adapter": LORA | {"init": "eva"}},
    "trained embeddings": {"adapter": LORA | {"modules_to_save": ["embed_tokens"]}},
    "no packing": {"data": {"packing": "none"}},
    "new tokens": {"adapter": {"method": "full"}, "model": {"new_tokens": NEW}},
    "new tokens, rows": {"adapter": LORA, "model": {"new_tokens": NEW, "vocabulary_multiple": 16}},
}


OTHERS = ("dora", "eva", "lora", "new tokens", "no packing", "pissa", "trained embeddings")
SLOW = pytest.mark.slow


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS: list[Any] = [
    *tiny_rows(7, seed=3),
    {"messages": None},  # row 8: bad
    {"messages": [{"role": "user", "content": "Nobody answers."}]},  # row 9: without a target
    chat("Long?", "yes " * 300),  # row 10: cut at 288 tokens
    chat("Weighed?", "A weight changes no score."),
]
ROWS[-1]["messages"][1]["weight"] = 0.5


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def scoring_of(
    storage: Path, changes: dict[str, Any], plan: RunPlan, weights: Weights, rows: Path
) -> tuple[RunPlan, StoreReport]:
    asked = config_from(config(storage, changes))
    sources = [DataSource(path=str(rows))]
    info = tokenised(sources if plan.template else as_text(sources), asked, plan, plan.storage, map)
    scoring = scoring_plan(plan, this_machine(asked.cluster), weights)
    data = plan.data.model_copy(update={"train": store_plan_of("rows", info), "validation": []})
    return scoring.model_copy(update={"storage": weights.folder.scores, "name": "here", "data": data}), info.report


def score_here(plan: RunPlan, weights: Weights) -> tuple[ScoredRow, ...]:
    rank, world = rank_and_world()
    worker = Worker(rank=rank, world_size=world, device_index=0, attempt=1, report=lambda metrics: None)
    perform("score", plan, worker, weights.request)
    return read_jsonl_table(read_bytes(RunFolder(plan.storage, plan.name).scored_rows)) if rank == 0 else ()


def plain_losses(result: RunResult, rows: Sequence[Any]) -> dict[int, tuple[int, float]]:
    """Row -> targets and mean loss, by the saved files and transformers alone."""
    model: Any = plainly_loaded(result.plan, result.model_path).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(result.model_path)
    found = {}
    for number, row in enumerate(rows, 1):
        if not row["messages"]:
            continue
        messages = [{key: message[key] for key in ("role", "content")} for message in row["messages"]]
        encoded: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids = torch.tensor(encoded["input_ids"][:288])
        labels = torch.where(torch.tensor(encoded["assistant_masks"][:288]) == 1, ids, -100)
        if not (labels != -100).any():
            continue
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        found[number] = int((labels[1:] != -100).sum()), F.cross_entropy(logits, labels[1:]).item()
    return found


def assert_equal(scored: Sequence[ScoredRow], expected: dict[int, tuple[int, float]], rows: Path) -> None:
    assert [row.row for row in scored] == [1, 2, 3, 4, 5, 6, 7, 10, 11] == list(expected)
    assert {row.file for row in scored} == {str(rows)}
    for row in scored:
        num_targets, loss = expected[row.row]
        assert row.targets == num_targets
        # fp32: products and means of 288 terms in another order, of losses near 5; and the exp of what is off by as much.
        assert row.loss == pytest.approx(loss, abs=1e-5)
        assert row.perplexity == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)


@pytest.mark.parametrize("variant", [pytest.param(name, marks=SLOW) if name in OTHERS else name for name in VARIANTS])
def test_each_row_has_the_loss_of_plain_transformers(variant: str, rows: Path, tmp_path: Path) -> None:
    result = finished(tmp_path, VARIANTS[variant])
    weights = Weights(folder=RunFolder(str(tmp_path), "whole-run"), step=None)
    plan, report = scoring_of(tmp_path, VARIANTS[variant], result.plan, weights, rows)
    assert_equal(score_here(plan, weights), plain_losses(result, ROWS), rows)
    lost = {"rows": 11, "used": 9, "bad": 1, "no_target": 1, "cut": 1}
    assert {count: report.total(count) for count in lost} == lost


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_checkpoint_is_scored_as_the_model_that_is_exported_from_it(method: str, rows: Path, tmp_path: Path) -> None:
    changes = {"adapter": LORA if method == "lora" else {"method": "full"}}
    result = finished(tmp_path, changes)
    folder = RunFolder(str(tmp_path), "whole-run")
    final, checkpoint = Weights(folder=folder, step=None), Weights(folder=folder, step=result.best_step)
    before = sorted(path for path in tmp_path.rglob("*") if "checkpoints" in path.parts)
    plan, _ = scoring_of(tmp_path, changes, result.plan, checkpoint, rows)
    from_checkpoint, from_model = score_here(plan, checkpoint), score_here(plan, final)
    # The same weights, those of the model after a way through a file; the sums are the same but for threads.
    assert [row.loss for row in from_checkpoint] == pytest.approx([row.loss for row in from_model], abs=1e-6)
    assert sorted(path for path in tmp_path.rglob("*") if "checkpoints" in path.parts) == before, "it is only read"
    damaged = next(path for path in before if path.name == "weights.safetensors" and f"{result.best_step:08d}" in str(path))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="is damaged"):
        score_here(plan, checkpoint)


@pytest.mark.parametrize("stage", variants([3], [0]))
def test_workers_that_share_rows_and_weights_score_as_one(stage: int, rows: Path, tmp_path: Path) -> None:
    result = finished(tmp_path, {"adapter": {"method": "full"}})
    weights = Weights(folder=RunFolder(str(tmp_path), "whole-run"), step=None)
    plan, _ = scoring_of(tmp_path, {}, result.plan, weights, rows)
    alone = score_here(plan, weights)
    engine = plan.engine.model_copy(update={"kind": "zero" if stage else "plain", "zero_stage": stage})
    batch = plan.batch.model_copy(update={"workers": 2, "micro_batch_size": 2})
    shared = run_on_ranks(score_here, 2, plan.model_copy(update={"batch": batch, "engine": engine}), weights)[0]
    assert [(row.row, row.targets) for row in shared] == [(row.row, row.targets) for row in alone]
    # Rows of one or two in a pass: fp32 products of other shapes, added in another order.
    assert [row.loss for row in shared] == pytest.approx([row.loss for row in alone], abs=1e-5)


def test_pieces_of_a_split_row_are_one_score(tmp_path: Path) -> None:
    text = tmp_path / "books.jsonl"
    text.write_text("".join(json.dumps({"text": words * 60}) + "\n" for words in ("one two three ", "a b c d ")))
    changes = {"data": {"max_length": 128, "limits": {"cut": 1, "lost": 1}}}
    result = finished(tmp_path, changes)
    weights = Weights(folder=RunFolder(str(tmp_path), "whole-run"), step=None)
    plan, report = scoring_of(tmp_path, changes, result.plan, weights, text)
    assert report.total("split") == 2
    scored = score_here(plan, weights)
    assert [(row.row, row.targets) for row in scored] == [(1, 14 * 60), (2, 8 * 60)]  # bytes and an end, without the first


def test_rows_that_no_line_tells_apart_are_refused_and_not_scored_as_one(tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": words}]} for words in ("b", "c d")]
    array, lines, line = tmp_path / "array.json", tmp_path / "lines.jsonl", tmp_path / "line.json"
    array.write_text(f"[{json.dumps(chats[0])}, {json.dumps(chats[1])},\n {json.dumps(chats[0])}]")
    lines.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    line.write_text(json.dumps(chats) + "\n")
    result = finished(tmp_path, {})
    weights = Weights(folder=RunFolder(str(tmp_path), "whole-run"), step=None)
    with pytest.raises(UserError, match=r"3 rows stand on 2 lines, .* several objects of a JSON array on one line"):
        scoring_of(tmp_path, {}, result.plan, weights, array)
    scored = []
    for rows in (lines, line):
        plan, _ = scoring_of(tmp_path, {}, result.plan, weights, rows)
        scored.append([(row.row, row.targets, row.loss) for row in score_here(plan, weights)])
    assert [row for row, _, _ in scored[0]] == [1, 2]
    assert scored[0] == scored[1], "an array that is all on one line has no lines but elements"


def test_a_whole_model_is_scored_though_its_base_is_gone(rows: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_tiny_model(base)
    changes = {"adapter": {"method": "full"}, "model": {"base": str(base)}}
    result = finished(tmp_path, changes)
    shutil.rmtree(base)
    weights = Weights(folder=RunFolder(str(tmp_path), "whole-run"), step=None)
    alone = result.plan.model_copy(update={"model": standing_alone(result.plan, weights)})
    refuse_changed_base(alone.model)
    plan, _ = scoring_of(tmp_path, changes, alone, weights, rows)
    assert_equal(score_here(plan, weights), plain_losses(result, ROWS), rows)
    for needs_base in (replace(weights, step=4), replace(weights, folder=RunFolder("s3://bucket/runs", "whole-run"))):
        assert standing_alone(result.plan, needs_base) == result.plan.model


def test_a_run_in_fp16_is_scored_on_a_cpu_in_fp32(rows: Path, tmp_path: Path) -> None:
    result = finished(tmp_path, {})
    half = result.plan.model.model_copy(update={"dtype": "fp16", "compute_dtype": "fp16"})
    weights = Weights(folder=RunFolder(str(tmp_path), "whole-run"), step=None)
    plan, _ = scoring_of(tmp_path, {}, result.plan.model_copy(update={"precision": "fp16", "model": half}), weights, rows)
    assert_equal(score_here(plan, weights), plain_losses(result, ROWS), rows)


def test_no_start_from_data_is_made_where_a_checkpoint_is_loaded_over_it(rows: Path, tmp_path: Path) -> None:
    result = finished(tmp_path, VARIANTS["eva"])
    weights = Weights(folder=RunFolder(str(tmp_path), "whole-run"), step=result.best_step)
    plan, _ = scoring_of(tmp_path, VARIANTS["eva"], result.plan, weights, rows)
    # More rows a look than any machine has room for: who looks fails.
    looking = plan.model_copy(update={"batch": plan.batch.model_copy(update={"accumulation": 10**12})})
    assert_equal(score_here(looking, weights), plain_losses(result, ROWS), rows)


def test_what_only_training_needs_is_not_planned_for_scoring(tmp_path: Path) -> None:
    plan = finished(tmp_path, {"training": {"neftune_noise_alpha": 5.0, "gradient_checkpointing": True}}).plan
    folder, here = RunFolder(str(tmp_path), "whole-run"), this_machine(config_from(config(tmp_path, {})).cluster)
    scoring = scoring_plan(plan, here, Weights(folder=folder, step=None))
    assert scoring.model.neftune_noise_alpha == 0
    assert not scoring.model.gradient_checkpointing
    divided = plan.model_copy(
        update={
            "batch": plan.batch.model_copy(update={"workers": 1000}),
            "engine": plan.engine.model_copy(update={"kind": "zero", "zero_stage": 2}),
        }
    )
    whole = scoring_plan(divided, here, Weights(folder=folder, step=None))
    assert (whole.engine.kind, whole.batch.workers) == ("plain", here.num_cpus)
    with pytest.raises(UserError, match="divided among 1000 workers"):
        scoring_plan(divided, here, Weights(folder=folder, step=4))


def test_a_format_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UserError, match="--format is 'chat', expected one of messages"):
        sources_of(["a.jsonl"], "chat", None)


def test_rows_of_turns_are_refused_for_a_run_of_plain_text_and_not_read_as_text() -> None:
    with pytest.raises(UserError, match="--format is messages, but the run was trained on plain text"):
        as_text(sources_of(["a.jsonl"], "messages", None))
    assert [source.format for source in as_text(sources_of(["a", "b"], "auto", 3))] == ["text", "text"]
