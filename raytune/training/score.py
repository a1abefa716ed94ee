"""The loss of each row of a data set under the weights of a run, on every rank: packed rows in, a line per row out."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from raytune import storage
from raytune.data.batches.batches import Batch, evaluation_batches
from raytune.data.store.store import Store
from raytune.errors import CheckpointError
from raytune.evaluation.scored_rows import ScoredRow, jsonl_table
from raytune.run_folder import RunFolder
from raytune.training.checkpoints.checkpoint import load_state
from raytune.training.checkpoints.commit import Commit, altered, bring, committed, misplaced
from raytune.training.checkpoints.peers import Peers
from raytune.training.start.start import Started
from raytune.training.steps.loop import evaluating


def score_rows(started: Started, request: Mapping[str, Any]) -> None:
    """Score the rows of the plan's store; rank 0 writes them into the plan's folder. Every rank calls it.

    What is written is a table of `ScoredRow`s in the order of the files. A row of which there are several pieces
    (`data.too_long: split`) is scored over all of them.

    Args:
        request: `checkpoint`, if the weights are those of a checkpoint: `{"storage": ..., "name": ..., "step": ...}` of a run.

    Raises:
        CheckpointError: on every rank, if that checkpoint is gone, damaged, or was divided in another way.
    """
    if request.get("checkpoint"):
        asked = request["checkpoint"]
        _load(started, RunFolder(asked["storage"], asked["name"]), asked["step"])
    plan, engine = started.plan, started.engine
    store = Store.open(plan.data.train.path)
    batches = evaluation_batches(
        store, rank=engine.rank, world=engine.world_size, micro_batch_size=plan.batch.micro_batch_size, max_rows=None
    )
    found: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    with engine.averaged(), evaluating(engine.model):
        for batch in batches:
            sources = [source for row in batch.rows for source in store.sources(row)]
            for source, loss, num_targets in zip(sources, *_by_document(started, batch), strict=True):
                if num_targets:  # rows beyond the end of the store have none
                    found[source][0] += loss
                    found[source][1] += num_targets
    merged: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for part in engine.gather_objects(dict(found)):
        for source, (loss, num_targets) in part.items():
            merged[source][0] += loss
            merged[source][1] += num_targets
    if engine.rank == 0:
        order = {file: place for place, file in enumerate(store.files)}
        rows = [
            ScoredRow(file=file, row=row, targets=int(num_targets), loss=loss / num_targets)
            for (file, row), (loss, num_targets) in sorted(merged.items(), key=lambda found: (order[found[0][0]], found[0][1]))
        ]
        storage.write_bytes(started.folder.scored_rows, jsonl_table(rows))


def _by_document(started: Started, batch: Batch) -> tuple[list[float], list[float]]:
    """Sum of the losses, and number of targets, of each document of a batch."""
    engine = started.engine
    batch = batch.to(engine.device)
    with engine.autocast():
        losses_M = started.loss.of_each_target(engine.module, batch)
    # A target lies one behind the position that predicts it, in the same document.
    documents_M = torch.searchsorted(batch.cumulative_lengths.long(), batch.target_positions, right=True) - 1
    sums_D = torch.zeros(len(batch.cumulative_lengths) - 1, dtype=torch.float64, device=engine.device)
    counts_D = torch.zeros_like(sums_D)
    sums_D.index_add_(0, documents_M, losses_M.double())
    counts_D.index_add_(0, documents_M, torch.ones_like(losses_M, dtype=torch.float64))
    return sums_D.tolist(), counts_D.tolist()


def _load(started: Started, folder: RunFolder, step: int) -> None:
    """Load a checkpoint of a run, which may be at work meanwhile: nothing is written there."""
    engine = started.engine
    peers = Peers(engine.rank, engine.gather_objects, CheckpointError)
    commit = peers.decide(lambda: _commit(folder, step))
    with TemporaryDirectory() as scratch:
        at_hand = peers.together(lambda: _fetched(commit, engine.rank, Path(scratch)))[engine.rank]
        peers.together(lambda: load_state(engine, commit, at_hand))


def _commit(folder: RunFolder, step: int) -> Commit:
    commit = next((commit for commit in committed(folder) if commit.step == step), None)
    if commit is None:
        raise CheckpointError(f"The checkpoint of step {step} in {folder.path} is gone. Run the same command again.")
    if problems := misplaced(commit, storage.file_sizes(commit.state)):
        raise CheckpointError(f"{commit.path} is damaged: {'; '.join(problems[:5])}.")
    return commit


def _fetched(commit: Commit, rank: int, scratch: Path) -> Path:
    """Where the files of a checkpoint that this rank loads lie on this node, checked."""
    if storage.is_local(commit.state):
        at_hand = storage.local_path(commit.state)
        problems = altered([file for file in commit.files if file.is_needed_by(rank)], lambda file: str(at_hand / file.name))
    else:
        at_hand, problems = scratch, bring(commit, rank, scratch)
    if problems:
        raise CheckpointError(f"{commit.path} is damaged: {'; '.join(problems[:5])}.")
    return at_hand
