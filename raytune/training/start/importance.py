"""The importance of weights for EWC: the diagonal of the empirical Fisher matrix, estimated once, before anything is trained.

Of each weight it is the mean, over documents, of the squared gradient of a document's loss: the sum over its targets of minus the
log-probability, each by its weight, under the base and without dropout or noise. What squares each document's gradient by itself,
before it is added to any other, is the engine's matter (`sum_squared_gradients`); ranks share the documents.

    <run>/importance/rank-0.safetensors     a rank's shares, or all of it where every rank has the whole
    <run>/importance/MANIFEST.json          what it was estimated from, how it is divided, sizes and hashes; written last
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from raytune import storage
from raytune.data.batches.batches import lone_batches
from raytune.data.store.order import rows_at
from raytune.data.store.store import Store
from raytune.errors import TrainingError
from raytune.plan.identity.division import Layout
from raytune.plan.identity.identity import differences, identity_of
from raytune.plan.identity.settings import key_of
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import MANIFEST
from raytune.storage import Digest
from raytune.training.checkpoints.peers import Peers, gather_in_own_group
from raytune.training.engines.engine import Engine
from raytune.training.start.start import Started

Tell = Callable[..., None]
PATIENCE_S = 12 * 3600.0
"""How long ranks wait for each other's files."""
_DECIDE = ("seed", "precision", "model.", "data.ewc", "optimization.ewc_documents")
"""Beginnings of values of an identity that decide importance."""


def hold_by_importance(started: Started, tell: Tell = lambda event, **facts: None) -> None:
    """Let the penalty on weights know how important each is, before the first step and before a checkpoint is loaded: as an
    earlier attempt has kept it, else estimated now. Every rank calls it; without EWC nothing happens.

    Args:
        tell: takes events of the run.

    Raises:
        TrainingError: on every rank, if a loss or a gradient is not finite.
    """
    plan, engine = started.plan, started.engine
    if not plan.optimization.ewc_strength:
        return
    kept = _Kept.of(started)
    shares, why = kept.read()
    if shares is None:
        began = time.monotonic()
        if why:
            tell("importance_again", why=why)
        tell("importance_started", documents=plan.optimization.ewc_documents)
        shares = estimated(started)
        kept.write(shares)
        tell("importance_estimated", documents=plan.optimization.ewc_documents, seconds=time.monotonic() - began)
    engine.weigh(shares)


def hold_for_once(started: Started) -> None:
    """`hold_by_importance`, for a task that keeps nothing of it: estimated now, from the base. Every rank calls it."""
    if started.plan.optimization.ewc_strength:
        started.engine.weigh(estimated(started))


def estimated(started: Started) -> dict[str, Tensor]:
    """This rank's shares of the importance, by the engine's names of them. Every rank calls it."""
    plan, engine = started.plan, started.engine
    assert plan.data.ewc is not None, "EWC has rows"
    store, count = Store.open(plan.data.ewc.path), plan.optimization.ewc_documents
    documents = rows_at(np.arange(count), store.num_rows, plan.seed).tolist()
    seen = _Seen()

    def losses() -> Iterator[Tensor]:
        for batch in lone_batches(store, documents, rank=engine.rank, world=engine.world_size):
            started.worker.check()
            batch = batch.to(engine.device)
            with engine.autocast():
                loss = started.loss.cross_entropy(engine.module, batch)
            seen.losses.append(loss.detach())
            seen.rows += batch.rows
            yield loss

    with undisturbed(engine.model):
        sums = engine.sum_squared_gradients(losses())
    seen.check(engine, store, sums)
    return {name: total.div_(count) for name, total in sums.items()}


@dataclass(slots=True)
class _Seen:
    """Documents of this rank, with their losses."""

    losses: list[Tensor] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def check(self, engine: Engine, store: Store, sums: dict[str, Tensor]) -> None:
        """Refuse what is not finite, on every rank alike."""
        bad = [row for row, is_good in zip(self.rows, torch.stack(self.losses).isfinite().tolist(), strict=True) if not is_good]
        are_finite = all(total.isfinite().all().item() for total in sums.values())
        found = engine.gather_objects((bad, are_finite))
        rows = [row for others, _ in found for row in others]
        if rows or not all(good for _, good in found):
            what = f"The loss of {store.named(rows)}" if rows else "A squared gradient"
            raise TrainingError(
                f"{what} of strategy.ewc.data is not finite under the base, so that there is no importance of weights. Look at "
                f"these rows, or train in fp32 (training.precision)."
            )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Context in which nothing is dropped and no noise added, but activations are recomputed where they are in training."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    rates: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True  # which it asks before it recomputes; a few also drop by it themselves
            rates += [(module, name, rate) for name, rate in vars(module).items() if "drop" in name and isinstance(rate, float)]
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)
        for module, training in was_training.items():
            module.training = training


# --- what is kept


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """Importance in the run folder."""

    folder: str
    plan: RunPlan
    engine: Engine
    peers: Peers

    @classmethod
    def of(cls, started: Started) -> "_Kept":
        engine = started.engine
        peers = Peers(engine.rank, gather_in_own_group(engine.world_size, PATIENCE_S), TrainingError)
        return cls(folder=started.folder.importance, plan=started.plan, engine=engine, peers=peers)

    @property
    def _layout(self) -> Layout:
        return Layout(zero_stage=self.plan.engine.zero_stage, world_size=self.engine.world_size, precision=self.plan.precision)

    @property
    def _file(self) -> str:
        """Of this rank."""
        return f"rank-{self.engine.rank if self._layout.is_sharded else 0}.safetensors"

    def read(self) -> tuple[dict[str, Tensor] | None, str]:
        """This rank's shares; or None on every rank, and why."""
        manifest = self.peers.decide(self._manifest)
        why = "" if manifest is None else self._why_not(manifest)
        if manifest is None or why:
            return None, why
        read: list[dict[str, Tensor]] = []
        damages = [each for each in self.peers.together(lambda: self._damage(manifest, read)) if each]
        return (None, damages[0]) if damages else (read[0], "")

    def _manifest(self) -> dict[str, Any] | None:
        try:
            return storage.read_json(f"{self.folder}/{MANIFEST}")
        except (FileNotFoundError, ValueError):  # it is written last, and whole
            return None

    def _why_not(self, manifest: dict[str, Any]) -> str:
        """Why what is kept is not what this run needs; empty if it is."""
        layout = Layout(**manifest["layout"])
        if not self._layout.loads(layout):
            return f"it was divided among {layout}, and this run has {self._layout}"
        changes = differences(manifest["identity"], identity_of(self.plan))
        keys = dict.fromkeys(key_of(name) for name in changes if name.startswith(_DECIDE))
        return f"it was estimated with another {', '.join(keys)}" if keys else ""

    def _damage(self, manifest: dict[str, Any], read: list[dict[str, Tensor]]) -> str:
        """Append what the file of this rank holds to `read`; or say what is wrong with it."""
        path = f"{self.folder}/{self._file}"
        try:
            if asdict(storage.file_digest(path)) != manifest["files"].get(self._file):
                return f"{path} is damaged"
        except FileNotFoundError:
            return f"{path} is missing"
        with _at_hand(path) as file:
            read.append(load_file(file))
        return ""

    def write(self, shares: dict[str, Tensor]) -> None:
        digests = self.peers.together(lambda: self._written(shares))
        files = {name: asdict(digest) for name, digest in filter(None, digests)}
        manifest = {"identity": identity_of(self.plan), "layout": asdict(self._layout), "files": files}
        self.peers.decide(lambda: storage.write_json(f"{self.folder}/{MANIFEST}", manifest))

    def _written(self, shares: dict[str, Tensor]) -> tuple[str, Digest] | None:
        if not self._layout.is_sharded and self.engine.rank:
            return None  # rank 0 has the same
        path = f"{self.folder}/{self._file}"
        tensors = {name: share.cpu().contiguous() for name, share in shares.items()}
        beside = None
        if storage.is_local(path):  # where there is room for it, and not where the system has its own
            beside = storage.local_path(self.folder)
            beside.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=beside) as scratch:
            save_file(tensors, Path(scratch, self._file))
            return self._file, storage.upload_file(Path(scratch, self._file), path)


@contextmanager
def _at_hand(path: str) -> Iterator[Path]:
    """A file of the run folder on this node."""
    if storage.is_local(path):
        yield storage.local_path(path)
        return
    with TemporaryDirectory() as scratch:
        target = Path(scratch, "shares.safetensors")
        storage.download_file(path, target)
        yield target
