"""An engine in this process that answers many requests at once: one thread has models write for all who wait."""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from raytune.errors import RaytuneError, UserError
from raytune.model.files.hub import download_base
from raytune.model.inference import HeldModels
from raytune.plan.model.base_model import is_on_hub
from raytune.plan.saved.asked_model import AskedModel
from raytune.plan.saved.serving import SPARE_COLUMNS, EngineLimits
from raytune.printable import first_line
from raytune.serving.batches import Asked, Batch, Row
from raytune.serving.checks import check_fit, check_request
from raytune.serving.lane import Lane
from raytune.serving.refusals import (
    AnswerFailedError,
    EngineDeadError,
    FullError,
    NotKnownError,
    TooLongError,
    UnfitError,
)
from raytune.serving.requests import Deliver, Piece, Request
from raytune.storage import is_local

_RATE_OVER_S = 10.0
_MOST_ADAPTERS = 1_000
"""Over one base: an engine has as many as it was told to load."""

_MOST_JOINING = 2
"""Batches of a model whose prompts are read at a time: a long prompt does not keep short ones waiting."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """What an engine is at, for whoever watches it. Counts are from its start."""

    is_alive: bool
    num_waiting: int
    num_running: int
    num_generated: int
    """Tokens."""
    num_prefilled: int
    """Tokens of prompts."""
    num_finished: int
    num_failed: int
    num_cancelled: int
    tokens_per_s: float
    """Generated, over the last seconds."""
    cached_tokens: int
    """Places for keys and values that are set aside, of `most_cached_tokens`."""
    running_by_model: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Load:
    name: str
    one: AskedModel
    done: Future[None]


class AnsweringEngine:
    """Answers requests to named models over one base.

    Requests of a model join a batch of theirs between two steps, and leave it as soon as they end; a step passes each model's
    rows on in turn. Who is next is the first request of the model with the fewest rows. A request that fails, fails alone or with
    the rows beside it; when the thread itself ends, everybody who waits is told.

    Args:
        models: by the names that requests give. One base, with any number of LoRA adapters over it, or one of another kind.
        device: cpu or cuda.

    Raises:
        ModelError: if a model cannot be loaded, or not beside the others.
    """

    def __init__(self, models: Mapping[str, AskedModel], *, device: str = "cpu", limits: EngineLimits | None = None) -> None:
        self._device, self._limits = torch.device(device), limits or EngineLimits()
        self._changed = threading.Condition()
        """Guards all that follows; what is in lanes is the thread's own."""
        self._dead: EngineDeadError | None = None
        self._is_closing = False
        self._lanes: list[Lane] = []
        """Those of models, and of some that were unloaded and have rows."""
        self._models: dict[str, Lane] = {}
        self._loads: deque[_Load] = deque()
        self._waiting: dict[Lane, deque[Row]] = {}
        self._rows: dict[str, Row] = {}
        """All that wait or run, by their ids, the first to come first."""
        self._most_now = self._limits.most_at_once
        """Rows at once; fewer than asked for while memory is short."""
        self._counts: dict[str, int] = dict.fromkeys(("generated", "prefilled", "finished", "failed", "cancelled"), 0)
        self._recent: deque[tuple[float, int]] = deque()
        """When tokens were generated, and how many."""
        self._cached_tokens = 0
        self._thread = threading.Thread(target=self._run, name="answering", daemon=True)
        self._thread.start()
        try:
            for name, one in models.items():
                self.load(name, one)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "AnsweringEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Have a request answered, from any thread.

        Raises:
            NotKnownError: if no model has that name.
            TooLongError: if it can never be answered.
            FullError: if too many wait.
            EngineDeadError: if nobody answers.
            UserError: if it makes no sense.
        """
        with self._changed:
            self._refuse_if_dead()
            lane = self._lane(request.model)
            check_request(request, lane.vocab)
            if request.id in self._rows:
                raise UserError(f"A request with id {request.id!r} is being answered. Give each an id of its own.")
            row = lane.row(request, deliver)
            self._check_length(row, lane)
            most = self._limits.most_at_once + self._limits.most_waiting
            if len(self._rows) >= most:
                raise FullError(
                    f"{len(self._rows)} requests are being answered or wait, and no more than {most} may. Try again later."
                )
            self._rows[request.id] = row
            self._waiting[lane].append(row)
            self._changed.notify_all()

    def cancel(self, id: str) -> None:
        """Let a request go, if it is not at its end; its last piece says so."""
        with self._changed:
            if (row := self._rows.get(id)) is not None:
                row.is_cancelled = True
                self._changed.notify_all()

    def load(self, name: str, model: AskedModel) -> None:
        """Take in another model, between two steps. Returns once it answers.

        Raises:
            UnfitError: if it cannot be served beside the others.
            ModelError: if it cannot be loaded.
            EngineDeadError: if nobody answers.
        """
        if threading.current_thread() is self._thread:
            raise UserError("A model cannot be loaded from within a delivery, for which everybody would wait.")
        done: Future[None] = Future()
        with self._changed:
            self._refuse_if_dead()
            self._loads.append(_Load(name, model, done))
            self._changed.notify_all()
        done.result()

    def unload(self, name: str) -> None:
        """Refuse new requests to a model from now on; it goes when those that it has are answered.

        Raises:
            NotKnownError: if no model has that name.
        """
        with self._changed:
            self._lane(name)
            del self._models[name]
            self._changed.notify_all()

    @property
    def models(self) -> Mapping[str, AskedModel]:
        """In the order in which they were loaded."""
        with self._changed:
            return {name: lane.one for name, lane in self._models.items()}

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        """Of a model, with its chat template.

        Raises:
            NotKnownError: if no model has that name.
        """
        with self._changed:
            return self._lane(name).tokenizer

    def longest(self, name: str) -> int:
        """Tokens of a prompt and its answer together, at most.

        Raises:
            NotKnownError: if no model has that name.
        """
        with self._changed:
            return self._longest(self._lane(name))

    @property
    def state(self) -> EngineState:
        with self._changed:
            now = time.monotonic()
            waiting = {row for rows in self._waiting.values() for row in rows}
            running = Counter(row.request.model for row in self._rows.values() if row not in waiting)
            return EngineState(
                is_alive=self._dead is None,
                num_waiting=len(waiting),
                num_running=running.total(),
                tokens_per_s=sum(number for when, number in self._recent if now - when < _RATE_OVER_S) / _RATE_OVER_S,
                cached_tokens=self._cached_tokens,
                running_by_model=running,
                **{f"num_{name}": count for name, count in self._counts.items()},
            )

    def close(self) -> None:
        """End; whoever waits is told."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _lane(self, name: str) -> Lane:
        if name not in self._models:
            known = ", ".join(self._models) or "none"
            raise NotKnownError(f"There is no model {name!r} here; there are: {known}.")
        return self._models[name]

    def _longest(self, lane: Lane) -> int:
        room = self._limits.most_cached_tokens - SPARE_COLUMNS - lane.virtual
        return room if lane.longest is None else min(room, lane.longest)

    def _check_length(self, row: Row, lane: Lane) -> None:
        request, most = row.request, self._longest(lane)
        if row.longest > most:
            why = "which is what the model has positions for" if most == lane.longest else "for which there is memory"
            raise TooLongError(
                f"The prompt has {len(request.prompt)} tokens, and {request.max_new_tokens} are asked for behind it: "
                f"{row.longest}, of at most {most}, {why}. Shorten the prompt, or ask for fewer."
            )

    def _refuse_if_dead(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(str(self._dead)) from self._dead

    # What follows runs in the thread.

    def _run(self) -> None:
        why = "The engine is closed."
        try:
            with HeldModels(self._device, most_adapters=_MOST_ADAPTERS) as held, torch.inference_mode():
                while self._wait():
                    self._let_go_cancelled()
                    self._load_and_unload(held)
                    self._have_join()
                    self._step(held)
                    self._cached_tokens = sum(lane.reserved() for lane in self._lanes)
        except BaseException as error:
            _log.exception("The engine has ended.")
            why = f"The engine has ended: {type(error).__name__}: {first_line(error)}"
        finally:
            self._die(EngineDeadError(why))

    def _wait(self) -> bool:
        """Wait for something to do. Returns whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self._loads or self._rows or len(self._lanes) > len(self._models))
            return not self._is_closing

    def _die(self, error: EngineDeadError) -> None:
        with self._changed:
            self._dead = error
            rows, loads = list(self._rows.values()), list(self._loads)
            self._rows, self._loads, self._cached_tokens = {}, deque(), 0
            self._lanes, self._waiting = [], {lane: deque() for lane in self._models.values()}
        for load in loads:
            load.done.set_exception(error)
        for row in rows:
            try:
                row.deliver(error)
            except BaseException:
                _log.exception("Nobody took the end of request %s.", row.request.id)

    def _let_go_cancelled(self) -> None:
        with self._changed:
            gone = [row for row in self._rows.values() if row.is_cancelled]
            for waiting in self._waiting.values() if gone else ():
                for row in [row for row in waiting if row.is_cancelled]:
                    waiting.remove(row)
        for row in gone:
            self._end(row, "cancelled", Piece(text="", num_tokens=row.num_generated, finish="cancelled"))
        self._leave(gone)

    def _load_and_unload(self, held: HeldModels) -> None:
        for lane in [lane for lane in self._lanes if self._models.get(lane.name) is not lane]:
            if not lane.rows and not self._waiting[lane]:
                with self._changed:
                    self._lanes.remove(lane)
                    del self._waiting[lane]
                self._release(lane.one, held)
        with self._changed:
            # What is asked of rows that are here must not change below them.
            leaving = [lane for lane in self._lanes if self._models.get(lane.name) is not lane]
            names, folders = {lane.name for lane in leaving}, {lane.one.adapter for lane in leaving} - {None}
            loads = [load for load in self._loads if load.name not in names and load.one.adapter not in folders]
            self._loads = deque(load for load in self._loads if load not in loads)
        for load in loads:
            try:
                lane = self._loaded(load.name, load.one, held)
            except Exception as error:
                load.done.set_exception(error)
            except BaseException as error:
                load.done.set_exception(EngineDeadError(f"The engine has ended: {first_line(error)}"))
                raise
            else:
                with self._changed:
                    self._lanes.append(lane)
                    self._waiting[lane] = deque()
                    self._models[load.name] = lane
                load.done.set_result(None)

    def _loaded(self, name: str, one: AskedModel, held: HeldModels) -> Lane:
        if name in self._models:
            raise UnfitError(f"There is a model {name!r} already. Unload it first, or choose another name.")
        try:
            why = held.why_apart(one, [lane.one for lane in self._lanes])
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise UnfitError(f"The adapter of {name!r} in {one.adapter} cannot be read: {first_line(error)}") from error
        if why:
            raise UnfitError(
                f"{name!r} cannot be served beside {', '.join(lane.name for lane in self._lanes)}: {why}. Merge it into its base "
                f"(`raytune merge`), or serve it alone."
            )
        check_fit(one)
        if is_local(one.model.path) and is_on_hub(one.model.path):
            download_base(one.model.path, one.model.revision, with_code=one.model.trust_remote_code)
        try:
            with held.asked(one) as loaded:
                return Lane(name, one, loaded)
        except Exception:
            self._release(one, held)
            raise

    def _release(self, one: AskedModel, held: HeldModels) -> None:
        if one.adapter and all(one.adapter != lane.one.adapter for lane in self._lanes):
            held.release(one)

    def _have_join(self) -> None:
        """Have requests join that wait, as far as there is room; of each model those that are read together."""
        running = sum(len(lane.rows) for lane in self._lanes)
        with self._changed:
            arrivals = {row: place for place, row in enumerate(self._rows.values())}
            begun: set[Lane] = {lane for lane in self._lanes if lane.num_joining >= _MOST_JOINING}
            while running < self._most_now:
                having = [lane for lane in self._lanes if self._waiting[lane] and lane not in begun]
                if not having:
                    break
                lane = min(having, key=lambda lane: (len(lane.rows), arrivals[self._waiting[lane][0]]))
                waiting = self._waiting[lane]
                joining = self._group(lane, waiting, self._most_now - running)
                if not joining:
                    break  # nobody passes the one for whom there is no room, or it would wait for ever
                for row in joining:
                    waiting.remove(row)
                lane.join(joining)
                begun.add(lane)
                running += len(joining)

    def _group(self, lane: Lane, waiting: Sequence[Row], most: int) -> list[Row]:
        room = self._limits.most_cached_tokens - sum(other.reserved() for other in self._lanes if other is not lane)
        joining: list[Row] = []
        for row in waiting:
            beside = [*joining, row]
            is_read_beside = not joining or lane.reads_together(beside, self._limits.most_prefilled)
            if is_read_beside and lane.reserved(beside) <= room:
                joining = beside
            if not joining or len(joining) == most:
                break
        return joining

    def _step(self, held: HeldModels) -> None:
        busy = [lane for lane in self._lanes if lane.batches]
        share = self._limits.most_prefilled // max(1, sum(lane.num_joining for lane in busy))
        for lane in busy:
            try:
                with held.asked(lane.one) as loaded:
                    asked = lane.switched(loaded)
                    for batch in list(lane.batches):
                        self._advance(lane, batch, asked, share)
            except Exception as error:
                self._fail(lane, lane.rows, error)
            lane.put_together()

    def _advance(self, lane: Lane, batch: Batch, asked: Asked, share: int) -> None:
        num_prompted = sum(len(row.ids) for row in batch.rows if row.choice is None)
        try:
            logits_BV = batch.advance(asked, share)
            if logits_BV is None:
                return
            tokens = lane.chosen(batch, asked, logits_BV)
        except Exception as error:
            lane.drop(batch)
            if _is_lack_of_memory(error):
                self._set_back(lane, batch.rows, error)
            else:
                self._fail(lane, batch.rows, error)
            return
        gone: list[Row] = []
        for row, token, logits_V in zip(list(batch.rows), tokens, logits_BV, strict=True):
            if token is None:
                self._fail(lane, [row], RaytuneError("the model gives no numbers (NaN)"))
                continue
            try:
                piece = lane.told(row, token, logits_V)
            except Exception as error:
                self._fail(lane, [row], error)
                continue
            if piece is not None and piece.finish is not None:
                self._end(row, "finished", piece)
                gone.append(row)
                self._most_now = min(self._most_now + 1, self._limits.most_at_once)
            elif piece is not None:
                self._deliver(row, piece)
        self._leave(gone)
        self._count(len(tokens), num_prompted)

    def _fail(self, lane: Lane, rows: Sequence[Row], error: Exception) -> None:
        words = error if isinstance(error, RaytuneError) else f"{type(error).__name__}: {first_line(error)}"
        told = AnswerFailedError(f"{lane.name} could not go on with an answer: {words}")
        if not isinstance(error, RaytuneError):
            _log.error("%s failed with %d rows.", lane.name, len(rows), exc_info=error)
        for row in rows:
            self._end(row, "failed", told)
        self._leave(rows)

    def _set_back(self, lane: Lane, rows: Sequence[Row], error: Exception) -> None:
        """Have rows begin again where they are, fewer at once; a row that is alone has failed."""
        running = len(rows) + sum(len(other.rows) for other in self._lanes)
        if running == 1:
            self._fail(lane, rows, RaytuneError("there is too little memory for it, though nothing else is answered"))
            return
        self._most_now = max(1, running // 2)
        _log.warning("Too little memory for %d answers at once (%s); %d from now.", running, first_line(error), self._most_now)
        with self._changed:
            self._waiting[lane].extendleft(reversed(rows))

    def _end(self, row: Row, how: str, last: Piece | Exception) -> None:
        with self._changed:
            if self._rows.get(row.request.id) is not row:
                return  # it has ended already
            del self._rows[row.request.id]
            self._counts[how] += 1
        self._deliver(row, last)

    def _deliver(self, row: Row, what: Piece | Exception) -> None:
        try:
            row.deliver(what)
        except Exception:
            _log.exception("Nobody took what is new of request %s; it is let go.", row.request.id)
            row.is_cancelled = True

    def _leave(self, rows: Sequence[Row]) -> None:
        gone = {id(row) for row in rows}
        for lane in self._lanes if gone else ():
            lane.leave(gone)

    def _count(self, num_generated: int, num_prefilled: int) -> None:
        now = time.monotonic()
        with self._changed:
            self._counts["generated"] += num_generated
            self._counts["prefilled"] += num_prefilled
            self._recent.append((now, num_generated))
            while now - self._recent[0][0] > _RATE_OVER_S:
                self._recent.popleft()


def _is_lack_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
