"""Suites at the end of a run, on every rank: base and tuned model, each loaded once for all of them, and a share of the rows."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from raytune.config.evaluation import SuiteKind
from raytune.data.tokenizers import load_tokenizer
from raytune.evaluate.compare import Comparison, Sample, compare
from raytune.evaluate.generation import write_answers
from raytune.evaluate.likelihood import Scored, log_likelihoods
from raytune.evaluate.questions import Question, from_json_lines
from raytune.evaluate.suite_metrics import Given, metrics_of
from raytune.model.adapters import adapting
from raytune.model.inference import base_then_tuned
from raytune.plan.run_plan import RunPlan, SuitePlan
from raytune.run_folder import RunFolder
from raytune.storage import download_folder, is_local, local_path, read_bytes, write_bytes
from raytune.training.engine import Engine
from raytune.training.peers import Peers

Rows = Mapping[int, Question]
"""Questions by their number in the suite."""
Answered = dict[str, dict[int, Given]]
"""What a model made of rows, by suite and number."""


def compare_suites(plan: RunPlan, engine: Engine, peers: Peers, folder: RunFolder) -> dict[str, Comparison]:
    """Measure base and tuned model on the questions of the run folder, from the files that a user would load.

    Each rank has its share of the rows.

    Args:
        engine: released; says which share is this rank's, and on which device.

    Returns:
        What all ranks' rows are worth, by suite, on rank 0, which also writes the rows to samples.jsonl. Nothing on others.
    """
    questions = from_json_lines(read_bytes(folder.questions))
    of_suites = {suite.name: [one for one in questions if one.suite == suite.name] for suite in plan.evaluation.suites}
    share = {
        name: {number: asked[number] for number in range(engine.rank, len(asked), engine.world_size)}
        for name, asked in of_suites.items()
    }
    parts = peers.together(lambda: _answered(plan, share, engine.device, folder))
    return peers.together(lambda: _judged(plan, of_suites, parts, engine, folder))[0]


def _judged(
    plan: RunPlan,
    of_suites: Mapping[str, Sequence[Question]],
    parts: Sequence[tuple[Answered, Answered]],
    engine: Engine,
    folder: RunFolder,
) -> dict[str, Comparison]:
    if engine.rank != 0:
        return {}
    comparisons, samples = {}, []
    for suite in plan.evaluation.suites:
        asked = of_suites[suite.name]
        base, tuned = ([_at(parts, side, suite.name, number) for number in range(len(asked))] for side in (0, 1))
        expected = [question.expected for question in asked]
        comparisons[suite.name] = compare(base, tuned, expected, metrics_of(suite, device=str(engine.device)))
        samples += [
            Sample(
                suite=suite.name,
                row=number,
                prompt=question.prompt,
                expected=question.expected,
                base=before.text,
                tuned=after.text,
                base_numbers=before.numbers,
                tuned_numbers=after.numbers,
            )
            for number, (question, before, after) in enumerate(zip(asked, base, tuned, strict=True))
        ]
    write_bytes(folder.samples, "".join(json.dumps(sample.to_json()) + "\n" for sample in samples).encode())
    return comparisons


def _at(parts: Sequence[tuple[Answered, Answered]], side: int, name: str, number: int) -> Given:
    return parts[number % len(parts)][side][name][number]


def _answered(plan: RunPlan, share: Mapping[str, Rows], device: torch.device, folder: RunFolder) -> tuple[Answered, Answered]:
    """What base and tuned model make of a share of the rows."""
    with TemporaryDirectory() as scratch:
        if is_local(folder.model):
            saved = local_path(folder.model)
        else:
            saved = Path(scratch)
            download_folder(folder.model, saved)
        tokenizer = load_tokenizer(str(saved), trust_remote_code=plan.model.trust_remote_code)
        found = []
        for model in base_then_tuned(plan, saved, device):
            found.append(answer_suites(model, tokenizer, plan, share))
            del model  # before the next one is loaded
    base, tuned = found
    return base, tuned


def answer_suites(model: Any, tokenizer: PreTrainedTokenizerBase, plan: RunPlan, share: Mapping[str, Rows]) -> Answered:
    """What a model makes of rows of suites."""
    return {suite.name: _ANSWER[suite.kind](model, tokenizer, plan, suite, share[suite.name]) for suite in plan.evaluation.suites}


def _write(model: Any, tokenizer: PreTrainedTokenizerBase, plan: RunPlan, suite: SuitePlan, rows: Rows) -> dict[int, Given]:
    answers = write_answers(
        model,
        tokenizer,
        [question.prompt_ids for question in rows.values()],
        max_new_tokens=suite.max_new_tokens,
        batch_size=suite.batch_size,
        num_beams=suite.num_beams,
        sampling=suite.sampling,
        rows=list(rows),
        kept=[one.token for one in plan.model.new_tokens],
        can_pad=adapting(plan.adapter).can_pad,
    )
    return {number: Given(text=answer) for number, answer in zip(rows, answers, strict=True)}


def _choose(model: Any, tokenizer: PreTrainedTokenizerBase, plan: RunPlan, suite: SuitePlan, rows: Rows) -> dict[int, Given]:
    scored = [
        Scored([*question.prompt_ids, *ids], range(len(question.prompt_ids), len(question.prompt_ids) + len(ids)))
        for question in rows.values()
        for ids in question.choice_ids
    ]
    found = iter(log_likelihoods(model, scored, batch_size=suite.batch_size))
    return {number: chosen(question, [next(found) for _ in question.choices]) for number, question in rows.items()}


def chosen(question: Question, log_likelihoods: Sequence[float]) -> Given:
    """The likeliest of a question's choices; of equally likely ones the first."""
    per_character = [value / len(choice) for value, choice in zip(log_likelihoods, question.choices, strict=True)]
    return Given(
        text=question.choices[log_likelihoods.index(max(log_likelihoods))],
        per_character=question.choices[per_character.index(max(per_character))],
        numbers=tuple(log_likelihoods),
    )


def _lose(model: Any, tokenizer: PreTrainedTokenizerBase, plan: RunPlan, suite: SuitePlan, rows: Rows) -> dict[int, Given]:
    scored = [Scored(question.prompt_ids, question.targets) for question in rows.values()]
    found = log_likelihoods(model, scored, batch_size=suite.batch_size)
    return {
        number: Given(
            text=f"loss {-value / len(question.targets):.4f} over {len(question.targets)} targets",
            numbers=(-value, float(len(question.targets))),
        )
        for (number, question), value in zip(rows.items(), found, strict=True)
    }


_ANSWER: Mapping[SuiteKind, Callable[[Any, PreTrainedTokenizerBase, RunPlan, SuitePlan, Rows], dict[int, Given]]] = {
    "answers": _write,
    "choices": _choose,
    "labels": _choose,
    "loss": _lose,
}
