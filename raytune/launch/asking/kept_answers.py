"""Answers of models to chunks of rows, on the workers of a cluster. Each finished chunk is kept in a folder, under a hash of what
decides its answers, so that who asks again goes on with the rest."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from raytune.config.sections.cluster import ClusterSection
from raytune.evaluation.answers import Chunk
from raytune.evaluation.suite_metrics import Given
from raytune.launch.asking.answering import AnsweringPlan, answer_on_cluster
from raytune.launch.asking.score import HERE, RunToScore
from raytune.launch.cluster.cluster import connect
from raytune.metrics.json_numbers import decode_number, encode_number
from raytune.plan.facts.machine import Machine
from raytune.plan.model.base_model import DEMO, is_on_hub
from raytune.plan.saved.asked_model import AskedModel, on_device
from raytune.run_folder import MODEL_CARD
from raytune.storage import exists, file_sizes, is_local, local_path, read_json, write_json

JUDGING = {"metrics", "code", "bertscore"}
"""What says of a suite how its answers are judged."""


def answers_of(
    tasks: Sequence[tuple[AskedModel, Chunk]],
    cluster: ClusterSection,
    run: RunToScore | None,
    path_of: Callable[[str], str],
    answered: Callable[[dict[int, Given]], None] = lambda given: None,
) -> list[dict[int, Given]]:
    """What models make of chunks, in the order of the tasks; those that have been answered are read.

    Args:
        tasks: model by model, so that each base is loaded once.
        run: whose numbers they are to be to the last bit, if any.
        path_of: where the answers of a chunk lie, by a hash of all that decides them.
        answered: called with what is answered now, and not read.

    Raises:
        RaytuneError: if the workers failed; what was answered is kept.
    """
    with connect(cluster, scales=False) as machine:
        answering = _answering_plan(cluster, run, machine)
        asked = [(on_device(one, answering.device), chunk) for one, chunk in tasks]
        files = {one.name: _content(one) for one in {one.name: one for one, _ in tasks}.values()}
        paths = [path_of(_fingerprint(one, files[one.name], chunk, answering)) for one, chunk in asked]
        found = [_kept(path) for path in paths]
        missing = [place for place, given in enumerate(found) if given is None]

        def keep(number: int, given: dict[int, Given]) -> None:
            place = missing[number]
            if not any(one.failed for one in given.values()):  # by a fault of a machine, perhaps, that is mended until next time
                write_json(paths[place], {str(row): _encoded(one) for row, one in given.items()})
            found[place] = given
            answered(given)

        if missing:
            answer_on_cluster(
                answering,
                [asked[place] for place in missing],
                keep,
                num_actors=min(len(missing), _num_actors(cluster, machine)),
                start_timeout=cluster.start_timeout,
            )
    return [given or {} for given in found]


def cluster_to_ask(run: RunToScore | None, address: str | None, workers: int | None) -> ClusterSection:
    """Where models are asked: where their run was trained, unless the user says otherwise; see `changed_cluster`."""
    return changed_cluster(run.config.cluster if run else ClusterSection(), address, workers)


def changed_cluster(section: ClusterSection, address: str | None, workers: int | None) -> ClusterSection:
    """A cluster as the user says it.

    Args:
        address: of a Ray cluster, as `cluster.address`; HERE starts one inside this machine; None: nothing is said.
        workers: that answer at once; None: nothing is said.
    """
    changes: dict[str, Any] = {} if address is None else {"address": None if address == HERE else address}
    changes |= {} if workers is None else {"workers": workers}
    return section.model_copy(update=changes)


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
    return hash_of([asked, files, content_of_chunk(chunk), answering.device, answering.tf32])[:40]


def content_of_chunk(chunk: Chunk) -> list[Any]:
    """What decides what a model makes of a chunk. How it is judged does not."""
    suite = chunk.suite.model_dump(mode="json", exclude={"name", *JUDGING})
    return [suite, [[number, {**asdict(question), "suite": ""}] for number, question in chunk.rows.items()]]


def hash_of(value: Any) -> str:
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


def _answering_plan(section: ClusterSection, run: RunToScore | None, machine: Machine) -> AnsweringPlan:
    device = "cuda" if machine.num_gpus and section.gpus_per_worker != 0 else "cpu"
    reserved = max(1, int(section.cpus_per_worker))
    share = machine.num_cpus // _num_actors(section, machine) if device == "cpu" else reserved
    threads = max(reserved, share) if section.threads_per_worker == "auto" else section.threads_per_worker
    if run and run.plan.cluster.device == device:  # numbers to the last bit depend on it
        threads = run.plan.cluster.threads_per_worker
    return AnsweringPlan(device=device, threads=threads, tf32=bool(run and run.plan.tf32), cpus=section.cpus_per_worker)


def _num_actors(section: ClusterSection, machine: Machine) -> int:
    """As many as the run has workers, or the user says; without a word one per GPU, or one of all CPUs of a node."""
    on_gpus = machine.num_gpus > 0 and section.gpus_per_worker != 0
    room = machine.num_gpus if on_gpus else int(machine.num_cpus // max(section.cpus_per_worker, 1e-9))
    usual = machine.num_gpus if on_gpus else machine.num_nodes
    return max(1, min(room, usual if section.workers == "auto" else section.workers))
