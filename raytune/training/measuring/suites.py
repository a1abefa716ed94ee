"""Suites at the end of a run, on every rank: base and tuned model, each loaded once, and a share of all chunks of rows."""

import json
from collections.abc import Mapping, Sequence

from raytune.evaluation.answers import Answered, Chunk, all_chunks, answer, together
from raytune.evaluation.compare import Comparison
from raytune.evaluation.judging import judged, samples_of
from raytune.evaluation.questions import Question, by_suite, from_json_lines
from raytune.model.inference import HeldModels, asked_of_run
from raytune.plan.run_plan import RunPlan
from raytune.plan.saved.asked_model import AskedModel
from raytune.run_folder import RunFolder
from raytune.storage import read_bytes, write_bytes
from raytune.training.checkpoints.peers import Peers
from raytune.training.engines.engine import Engine

BASE, TUNED = "base", "tuned"


def compare_suites(plan: RunPlan, engine: Engine, peers: Peers, folder: RunFolder) -> dict[str, Comparison]:
    """Measure base and tuned model on the questions of the run folder, from the files that a user would load.

    Each rank has its share of the chunks.

    Args:
        engine: released; says which share is this rank's, and on which device.

    Returns:
        What all ranks' rows are worth, by suite, on rank 0, which also writes the rows to samples.jsonl. Nothing on others.
    """
    asked = by_suite(plan.evaluation.suites, from_json_lines(read_bytes(folder.questions)))
    parts = peers.together(lambda: _answered(plan, asked, engine, folder))
    return peers.together(lambda: _judged(plan, asked, parts, engine, folder))[0]


def _answered(plan: RunPlan, asked: Mapping[str, Sequence[Question]], engine: Engine, folder: RunFolder) -> dict[str, Answered]:
    """What base and tuned model make of this rank's chunks."""
    own = all_chunks(plan.evaluation.suites, asked)[engine.rank :: engine.world_size]
    with HeldModels(engine.device) as models:
        return {one.name: of_model(models, one, own) for one in asked_of_run(plan, folder.model, base=BASE, tuned=TUNED)}


def of_model(models: HeldModels, one: AskedModel, chunks: Sequence[Chunk]) -> Answered:
    """What a model makes of chunks, by suite and row."""
    found: Answered = {}
    with models.asked(one) as loaded:
        for chunk in chunks:
            found.setdefault(chunk.suite.name, {}).update(answer(loaded, chunk.suite, chunk.rows))
    return found


def _judged(
    plan: RunPlan,
    asked: Mapping[str, Sequence[Question]],
    parts: Sequence[Mapping[str, Answered]],
    engine: Engine,
    folder: RunFolder,
) -> dict[str, Comparison]:
    if engine.rank != 0:
        return {}
    base, tuned = (together([part[model] for part in parts], asked) for model in (BASE, TUNED))
    samples = [
        sample
        for suite in plan.evaluation.suites
        for sample in samples_of(suite, asked[suite.name], base[suite.name], tuned[suite.name])
    ]
    write_bytes(folder.samples, "".join(json.dumps(sample.to_json()) + "\n" for sample in samples).encode())
    return {
        suite.name: judged(suite, asked[suite.name], base[suite.name], tuned[suite.name], device=str(engine.device))
        for suite in plan.evaluation.suites
    }
