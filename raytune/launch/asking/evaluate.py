"""`raytune evaluate`: models measured on suites, on the workers of a cluster. What was answered lies in the output folder, chunk
by chunk, so that the same command goes on."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from raytune.config.sections.cluster import ClusterSection
from raytune.config.sections.evaluation import SuiteSection, suites_of
from raytune.config.sections.run import RunConfig
from raytune.config.suite_file import read_suites, suites_by_key
from raytune.config.words.places import errors_at
from raytune.errors import UserError
from raytune.evaluation.answers import Answered, Chunk, all_chunks, together
from raytune.evaluation.questions import Question, by_suite, from_json_lines
from raytune.evaluation.side_by_side import Evaluation, paired, samples_of_models, values_of
from raytune.evaluation.suite_metrics import Given, metrics_of
from raytune.launch.asking.kept_answers import JUDGING, answers_of, cluster_to_ask, content_of_chunk, hash_of
from raytune.launch.asking.models_to_ask import Named, ToAsk, models_to_ask
from raytune.plan.choosing.suites import suite_plan
from raytune.plan.run_plan import SuitePlan
from raytune.plan.saved.asked_model import AskedModel
from raytune.run_folder import EvaluationFolder
from raytune.storage import absolute, exists, read_bytes, read_json, write_bytes, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Models and rows that are ready to be measured."""

    to_ask: ToAsk
    suites: tuple[SuitePlan, ...]
    asked: Mapping[str, Mapping[str, Sequence[Question]]]
    """Questions by model and suite, as the model's own tokenizer reads them."""
    cluster: ClusterSection
    title: str

    @property
    def expected(self) -> dict[str, list[str]]:
        first = self.asked[self.to_ask.subjects[0].name]
        return {suite: [question.expected for question in questions] for suite, questions in first.items()}


def prepare_evaluation(
    named: Named, *, suite: str | None = None, address: str | None = None, workers: int | None = None
) -> Prepared:
    """Read the rows of all suites for each model, and refuse what cannot be measured, before anything is started.

    Args:
        suite: a file of suites; None: those of the run.
        address: of a Ray cluster, as `cluster.address`, instead of the run's; HERE starts one inside this machine.
        workers: that answer at once; None: as many as the run, or the cluster, has.

    Raises:
        UserError: if there are no models, suites or rows, or models cannot be asked them.
    """
    if suite is None:
        return _prepared(models_to_ask(named), None, "own-suites", address, workers)
    file, places = read_suites(suite)
    with errors_at(file, places):
        return _prepared(models_to_ask(named), file, Path(suite).stem, address, workers)


def _prepared(to_ask: ToAsk, file: RunConfig | None, title: str, address: str | None, workers: int | None) -> Prepared:
    run = to_ask.run
    if file is None and (run is None or not run.plan.evaluation.suites):
        what = f"{to_ask.subjects[0].source} is no run" if run is None else f"Run {run.folder.name!r} has no suites of its own"
        raise UserError(f"{what}, so that there is nothing to measure on. Name a file of suites: --suite FILE.")
    if file is not None:
        by_key, stored = suites_by_key(file), None
        suites = tuple(suite_plan(suite, key) for key, suite in by_key.items())
    else:
        assert run is not None
        file, suites = run.config, run.plan.evaluation.suites
        by_key, stored = suites_of(file.evaluation), from_json_lines(read_bytes(run.folder.questions))
    for suite in suites:
        metrics_of(suite)  # before hours of answering
    asked = _questions(to_ask, file, by_key, suites, stored)
    _refuse_incomparable(to_ask, suites, asked)
    return Prepared(
        to_ask=to_ask,
        suites=suites,
        asked=asked,
        cluster=cluster_to_ask(run, address, workers),
        title=re.sub(r"[^\w.-]+", "-", title).strip("-.") or "suites",
    )


def evaluate(prepared: Prepared, output: str | None = None) -> Evaluation:
    """Measure what was prepared, or go on with it.

    Args:
        output: folder. Default: `evaluations/NAME` in the run folder, or in the current one where there is no run.

    Raises:
        UserError: if the folder holds another evaluation.
        RaytuneError: if the workers failed; what was answered is kept.
    """
    to_ask, chunks = prepared.to_ask, _chunks(prepared)
    identity = identity_of(prepared)
    folder = folder_for(prepared, identity, output)
    write_json(folder.identity, identity)
    tasks = [(one.asked, chunk) for one in to_ask.subjects for chunk in chunks[one.name]]
    found = answers_of(tasks, prepared.cluster, to_ask.run, folder.chunk)
    return _judged(prepared, folder, tasks, found)


# --- What is asked -----------------------------------------------------------------------------------------------------------


def _questions(
    to_ask: ToAsk,
    file: RunConfig,
    by_key: Mapping[str, SuiteSection],
    suites: Sequence[SuitePlan],
    stored: list[Question] | None,
) -> dict[str, dict[str, list[Question]]]:
    """The rows of all suites for each model; those that read rows alike share them."""
    known: dict[Any, list[Question]] = {}
    if stored is not None:
        known[to_ask.subjects[0].reader.same_rows] = stored
    found = {}
    for one in to_ask.subjects:
        if (reads := one.reader.same_rows) not in known:
            with TemporaryDirectory() as scratch:
                known[reads] = one.reader.questions(file, by_key, scratch)
        found[one.name] = by_suite(suites, known[reads])
    return found


def _refuse_incomparable(
    to_ask: ToAsk, suites: Sequence[SuitePlan], asked: Mapping[str, Mapping[str, Sequence[Question]]]
) -> None:
    first, *others = to_ask.subjects
    for one in to_ask.subjects:
        largest = max(question.largest_token for questions in asked[one.name].values() for question in questions)
        if largest >= one.vocab:
            raise UserError(
                f"{one.source} has embeddings for {one.vocab} tokens, but rows have token {largest} of the tokenizer that they "
                f"are read by ({one.reader.tokenizer}). Name the base that belongs to the model."
            )
    for one in others:
        for suite in suites:
            rows, own = asked[first.name][suite.name], asked[one.name][suite.name]
            if suite.kind == "loss" and [row.prompt_ids for row in rows] != [row.prompt_ids for row in own]:
                raise UserError(
                    f"Suite {suite.name!r} measures the loss per token, and {one.source} has other tokens than {first.source}: "
                    f"the two cannot be compared by it. Leave the suite out."
                )
            if len(rows) != len(own):
                raise UserError(f"Suite {suite.name!r} has {len(rows)} rows for {first.source}, and {len(own)} for {one.source}.")


# --- Where, and what of it is there already ----------------------------------------------------------------------------------


def _chunks(prepared: Prepared) -> dict[str, list[Chunk]]:
    return {name: all_chunks(prepared.suites, asked) for name, asked in prepared.asked.items()}


def identity_of(prepared: Prepared) -> dict[str, Any]:
    """What an evaluation is of: the same command has the same one, and so has one that judges the same answers otherwise."""
    return {
        "models": [one.asked.model_dump(mode="json") for one in prepared.to_ask.subjects],
        "sources": {one.name: one.source for one in prepared.to_ask.subjects},
        "pairs": [list(pair) for pair in prepared.to_ask.pairs],
        "suites": [suite.model_dump(mode="json", exclude=JUDGING) for suite in prepared.suites],
        "rows": {name: hash_of([content_of_chunk(chunk) for chunk in of_model]) for name, of_model in _chunks(prepared).items()},
    }


def folder_for(prepared: Prepared, identity: Mapping[str, Any], output: str | None = None) -> EvaluationFolder:
    """Where results are to lie. What nobody named takes no other evaluation's place.

    Raises:
        UserError: if the one that was named holds another one.
    """

    def is_own(folder: EvaluationFolder) -> bool:
        return not exists(folder.identity) or read_json(folder.identity) == identity

    if output is not None:
        folder = EvaluationFolder(absolute(output))
        if not is_own(folder):
            raise UserError(
                f"--output is {output}, which holds an evaluation of other models, suites or rows. Name another folder."
            )
        return folder
    run, title = prepared.to_ask.run, prepared.title
    if run is None:
        root, name = absolute("evaluations"), f"{prepared.to_ask.title}-{title}"
    else:
        beside = prepared.to_ask.title.partition("-against-")[1:]
        root, name = run.folder.evaluations, f"{title}{''.join(beside)}"
    folders = (EvaluationFolder(f"{root}/{name}{'' if number == 1 else f'-{number}'}") for number in count(1))
    return next(folder for folder in folders if is_own(folder))


# --- What it comes to -------------------------------------------------------------------------------------------------------


def _judged(
    prepared: Prepared,
    folder: EvaluationFolder,
    tasks: Sequence[tuple[AskedModel, Chunk]],
    found: Sequence[dict[int, Given]],
) -> Evaluation:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where a metric that has a model runs it: here
    parts: dict[str, list[Answered]] = {one.name: [] for one in prepared.to_ask.subjects}
    for (one, chunk), given in zip(tasks, found, strict=True):
        parts[one.name].append({chunk.suite.name: given})
    answers = {name: together(of_model, prepared.asked[name]) for name, of_model in parts.items()}
    expected = prepared.expected
    judged = {
        suite.name: values_of(suite, expected[suite.name], {name: of[suite.name] for name, of in answers.items()}, device)
        for suite in prepared.suites
    }
    result = Evaluation(
        output=folder.path,
        models={one.name: one.source for one in prepared.to_ask.subjects},
        num_rows={suite: len(rows) for suite, rows in expected.items()},
        values={suite: values for suite, (values, _) in judged.items()},
        failed={suite: failed for suite, (_, failed) in judged.items()},
        pairs=tuple(paired(before, after, prepared.suites, expected, answers, device) for before, after in prepared.to_ask.pairs),
    )
    samples = samples_of_models(prepared.asked[prepared.to_ask.subjects[0].name], answers)
    write_bytes(folder.samples, "".join(json.dumps(sample) + "\n" for sample in samples).encode())
    write_json(folder.result, result.to_json())
    return result
