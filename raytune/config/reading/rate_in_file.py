"""A learning rate written into the YAML file of a run, whose comments and layout stay as they are."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raytune.config.problems import Place
from raytune.config.reading.files import read_file
from raytune.config.reading.overlays import child_of
from raytune.config.sections.run import RunConfig
from raytune.config.yaml_nodes import read_nodes, with_value
from raytune.errors import UserError
from raytune.local_files import replace_file

SECTION, NAME = "training", "learning_rate"
KEY = f"{SECTION}.{NAME}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedRate:
    file: str
    before: Any
    """As it was written; None: it was not."""
    after: float

    @property
    def sentence(self) -> str:
        return f"{self.file}: {KEY} {'unwritten (auto)' if self.before is None else self.before} -> {written(self.after)}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def written(rate: float) -> str:
    """As every reader of YAML takes for a number: older ones want a point before an exponent."""
    return f"{rate:.1e}"


def key_of_rate(config: RunConfig) -> str:
    """The key of the rate that a run begins with: that of its first phase, where the phase has one."""
    phases = config.strategy.unfreeze
    return KEY if not phases or phases[0].learning_rate is None else "strategy.unfreeze.0.learning_rate"


def file_for_rate(files: Sequence[str], places: Mapping[str, Place], config: RunConfig) -> str:
    """The file that a rate is to be written into: the one that is given, where nothing that lies over it says another.

    Args:
        places: where the keys of the config were written.
        config: that the files make.

    Raises:
        UserError: if there is no such file, or the rate would not count there.
    """
    if not files:
        raise UserError("--apply writes into the YAML file of a run, and none is given.")
    first = files[0]
    if (own := key_of_rate(config)) != KEY:
        raise UserError(
            f"--apply writes {KEY}, but the first phase of strategy.unfreeze, which is what is tried, has a learning_rate of its "
            f"own. Leave --apply out, and write the rate as {own} yourself.",
            keys=(own,),
        )
    place = places.get(KEY)
    for rank, file in enumerate(files):  # read as they are: they may be valid with their overrides alone
        if (varied := _varied_in(file, rank)) is not None:
            raise _refused(varied, f"sweep.space.{KEY}", f"a sweep varies it, so a rate in {first} would not count")
    if place is not None and (place.line is None or place.file != first):
        raise _refused(place, KEY, f"it is set there, over {first}. Take it away, or write the rate there yourself")
    read_written(first)
    return first


def _varied_in(file: str, rank: int) -> Place | None:
    """Where a file's own sweep says how the rate varies."""
    node = read_file(file, rank)[0]
    for name in ("sweep", "space", KEY):
        node = child_of(node, name) if node else None
    return node.key_place if node else None


def read_written(file: str) -> Any:
    """What the file itself says; None: nothing."""
    tree, _ = read_file(file, 0)
    section = (tree.plain or {}).get(SECTION) if tree else None
    return section.get(NAME) if isinstance(section, dict) else None


def write_rate(file: str, rate: float) -> AppliedRate:
    """Write a rate into a file, whole or not at all. Every other key keeps its value, which is checked before.

    Raises:
        UserError: if the file is written in a way that leaves no place for the key; it is not touched.
    """
    target = Path(os.path.realpath(file))  # a link stays one
    before = read_written(file)
    content = target.read_bytes()
    text = content.decode("utf-8-sig")
    mark = content[: len(content) - len(text.encode())]  # of the byte order, if there is one
    changed = with_value(text, SECTION, NAME, written(rate))
    if _values(changed) != _with_rate(_values(text), rate):
        raise UserError(
            f"{file} is written in a way that {KEY} cannot be changed in without changing more (an anchor, for one). Write "
            f"{NAME}: {written(rate)} below {SECTION} yourself."
        )
    mode = target.stat().st_mode
    replace_file(target, lambda opened: opened.write(mark + changed.encode()))
    target.chmod(mode)
    return AppliedRate(file=file, before=before, after=rate)


def _values(text: str) -> Any:
    tree, problems = read_nodes(text, Place("config", 1, 1))
    return None if tree is None or problems else tree.plain or {}


def _with_rate(values: Any, rate: float) -> Any:
    return values | {SECTION: (values.get(SECTION) or {}) | {NAME: rate}}


def _refused(place: Place, key: str, why: str) -> UserError:
    error = UserError(f"--apply cannot set {KEY}: {why}.", keys=(key,))
    error.place = f"{place}  {key}"
    return error
