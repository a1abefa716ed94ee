"""`raytune evaluate`: models measured on suites, on the workers of a cluster. What was answered lies in the output folder, chunk
by chunk, so that the same command goes on."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from raytune.config.cluster import ClusterSection
from raytune.config.evaluation import SuiteSection, suites_of
from raytune.config.places import errors_at
from raytune.config.run import RunConfig
from raytune.config.suite_file import read_suites, suites_by_key
from raytune.errors import UserError
from raytune.evaluation.answers import Answered, Chunk, all_chunks, together
from raytune.evaluation.questions import Question, by_suite, from_json_lines
from raytune.evaluation.side_by_side import Evaluation, paired, samples_of_models, values_of
from raytune.evaluation.suite_metrics import Given, metrics_of
from raytune.launch.answering import AnsweringPlan, answer_on_cluster
from raytune.launch.cluster import connect
from raytune.launch.models_to_ask import Named, ToAsk, models_to_ask
from raytune.launch.score import HERE
from raytune.metrics.json_numbers import decode_number, encode_number
from raytune.plan.asked_model import AskedModel, on_device
from raytune.plan.base_model import DEMO, is_on_hub
from raytune.plan.machine import Machine
from raytune.plan.run_plan import SuitePlan
from raytune.plan.suites import suite_plan
from raytune.run_folder import MODEL_CARD, EvaluationFolder
from raytune.storage import absolute, exists, file_sizes, is_local, local_path, read_bytes, read_json, write_bytes, write_json

JUDGING = {"metrics", "code", "bertscore"}
"""What says of a suite how its answers are judged."""


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
    section = run.config.cluster if run else ClusterSection()
    changes: dict[str, Any] = {} if address is None else {"address": None if address == HERE else address}
    changes |= {} if workers is None else {"workers": workers}
    return Prepared(
        to_ask=to_ask,
        suites=suites,
        asked=asked,
        cluster=section.model_copy(update=changes),
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
    with connect(prepared.cluster, scales=False) as machine:
        answering = _answering_plan(prepared, machine)
        tasks = [(on_device(one.asked, answering.device), chunk) for one in to_ask.subjects for chunk in chunks[one.name]]
        files = {one.name: _content(one.asked) for one in to_ask.subjects}
        paths = [folder.chunk(_fingerprint(one, files[one.name], chunk, answering)) for one, chunk in tasks]
        found: list[dict[int, Given] | None] = [_kept(path) for path in paths]
        missing = [place for place, given in enumerate(found) if given is None]

        def keep(number: int, given: dict[int, Given]) -> None:
            place = missing[number]
            if not any(one.failed for one in given.values()):  # by a fault of a machine, perhaps, that is mended until next time
                write_json(paths[place], {str(row): _encoded(one) for row, one in given.items()})
            found[place] = given

        if missing:
            answer_on_cluster(
                answering,
                [tasks[place] for place in missing],
                keep,
                num_actors=min(len(missing), _num_actors(prepared, machine)),
                start_timeout=prepared.cluster.start_timeout,
            )
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
        "rows": {name: _hash([_of_chunk(chunk) for chunk in of_model]) for name, of_model in _chunks(prepared).items()},
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


def _content(one: AskedModel) -> list[Any]:
    """What tells that a model's files are the same as before, without reading weights."""
    folders = [one.model.path, *([one.adapter] if one.adapter else []), *([one.stops] if one.stops else [])]
    return [[folder, one.model.revision, *_files(folder)] for folder in folders]


def _files(folder: str) -> list[Any]:
    if folder == DEMO or (is_local(folder) and is_on_hub(folder)):
        return []
    if not is_local(folder):
        return sorted((name, size) for name, size in file_sizes(folder).items() if name != MODEL_CARD)
    files = [path for path in local_path(folder).iterdir() if path.is_file() and path.name != MODEL_CARD]
    return sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def _fingerprint(one: AskedModel, files: Sequence[Any], chunk: Chunk, answering: AnsweringPlan) -> str:
    """Of a model and the rows that it is asked: the same ones have been answered already."""
    asked = one.model_copy(update={"name": ""}).model_dump(mode="json")
    return _hash([asked, files, _of_chunk(chunk), answering.device, answering.tf32])[:40]


def _of_chunk(chunk: Chunk) -> list[Any]:
    """What decides what a model makes of a chunk. How it is judged does not."""
    suite = chunk.suite.model_dump(mode="json", exclude={"name", *JUDGING})
    return [suite, [[number, {**asdict(question), "suite": ""}] for number, question in chunk.rows.items()]]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()


def _kept(path: str) -> dict[int, Given] | None:
    """What was answered before; None: nothing."""
    if not exists(path):
        return None
    return {int(row): _given(values) for row, values in read_json(path).items()}


def _encoded(given: Given) -> dict[str, Any]:
    values = {name: [encode_number(value) for value in found] for name, found in given.values.items()}
    return asdict(given) | {"numbers": [encode_number(value) for value in given.numbers], "values": values}


def _given(values: Mapping[str, Any]) -> Given:
    of_task = {name: tuple(map(decode_number, found)) for name, found in values.get("values", {}).items()}
    return Given(**{**values, "numbers": tuple(map(decode_number, values["numbers"])), "values": of_task})


# --- Who answers, and what it comes to ---------------------------------------------------------------------------------------


def _answering_plan(prepared: Prepared, machine: Machine) -> AnsweringPlan:
    section, run = prepared.cluster, prepared.to_ask.run
    device = "cuda" if machine.num_gpus and section.gpus_per_worker != 0 else "cpu"
    reserved = max(1, int(section.cpus_per_worker))
    share = machine.num_cpus // _num_actors(prepared, machine) if device == "cpu" else reserved
    threads = max(reserved, share) if section.threads_per_worker == "auto" else section.threads_per_worker
    if run and run.plan.cluster.device == device:  # numbers to the last bit depend on it
        threads = run.plan.cluster.threads_per_worker
    return AnsweringPlan(device=device, threads=threads, tf32=bool(run and run.plan.tf32), cpus=section.cpus_per_worker)


def _num_actors(prepared: Prepared, machine: Machine) -> int:
    """As many as the run has workers, or the user says; without a word one per GPU, or one of all CPUs of a node."""
    section, on_gpus = prepared.cluster, machine.num_gpus > 0 and prepared.cluster.gpus_per_worker != 0
    room = machine.num_gpus if on_gpus else int(machine.num_cpus // max(section.cpus_per_worker, 1e-9))
    usual = machine.num_gpus if on_gpus else machine.num_nodes
    return max(1, min(room, usual if section.workers == "auto" else section.workers))


def _judged(
    prepared: Prepared,
    folder: EvaluationFolder,
    tasks: Sequence[tuple[AskedModel, Chunk]],
    found: Sequence[dict[int, Given] | None],
) -> Evaluation:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where a metric that has a model runs it: here
    parts: dict[str, list[Answered]] = {one.name: [] for one in prepared.to_ask.subjects}
    for (one, chunk), given in zip(tasks, found, strict=True):
        parts[one.name].append({chunk.suite.name: given or {}})
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
