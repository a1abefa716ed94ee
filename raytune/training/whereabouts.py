"""What the training thread of this process is doing just now, for others to ask: at which step, and whether it waits for ranks.

Read from its stack, so it costs a step nothing and knows of every place that a rank can hang in.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import raytune
from raytune.model.parts.collectives import arrived

_PACKAGE = str(Path(raytune.__file__).parent)
_STEPS = "training_steps"
"""Name of the generator that makes the steps; its local `step` counts those before."""
_BETWEEN = "_make_steps"
"""Name of its caller, who evaluates, saves and agrees with other ranks between steps; its local `step` counts those made."""
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
_threads: list[int] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """Where a rank is."""

    step: int | None
    """Being made, or the last one made; None: before and after all steps, while a model is loaded, for example."""
    is_made: bool = False
    """Whether the step is over, and what comes after it is under way: an evaluation or a save, for example."""
    place: str
    """File, line and function, innermost of raytune's own, and the function of a library in which it is."""
    waits: bool
    """Whether it is inside an operation that all ranks take part in."""

    def __str__(self) -> str:
        step = "" if self.step is None else f" {'after' if self.is_made else 'in'} step {self.step}"
        return f"{'waits for the others' if self.waits else 'is'}{step} ({self.place})"


@contextmanager
def findable() -> Iterator[None]:
    """Let this thread be found by `whereabouts`."""
    _threads.append(threading.get_ident())
    try:
        yield
    finally:
        _threads.pop()


def whereabouts() -> Whereabouts | None:
    """Where the training thread is, asked by another one of its process; None if there is none."""
    frame = sys._current_frames().get(_threads[-1]) if _threads else None
    return _read(list(_outwards(frame))) if frame else None


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _read(frames: list[FrameType]) -> Whereabouts:
    """What a stack says.

    Args:
        frames: the innermost first.
    """
    innermost = frames[0]
    own = next((frame for frame in frames if frame.f_code.co_filename.startswith(_PACKAGE) and not _is_arrived(frame)), innermost)
    within = frames[: frames.index(own)]
    place = f"{Path(own.f_code.co_filename).name}:{own.f_lineno} {own.f_code.co_name}"
    if within:
        place += f", in {within[0].f_code.co_name} of {Path(within[0].f_code.co_filename).name}"
    being_made, made = (_step_of(name, frames) for name in (_STEPS, _BETWEEN))
    return Whereabouts(
        step=made if being_made is None else being_made + 1,
        is_made=being_made is None and made is not None,
        place=place,
        waits=any(_is_arrived(frame) or part in frame.f_code.co_filename for frame in within for part in _COLLECTIVES),
    )


def _is_arrived(frame: FrameType) -> bool:
    return frame.f_code is arrived.__code__


def _step_of(function: str, frames: list[FrameType]) -> int | None:
    """The local `step` of a function; None if it is not on the stack or has none yet."""
    frame = next((frame for frame in frames if frame.f_code.co_name == function), None)
    return frame.f_locals.get("step") if frame else None
