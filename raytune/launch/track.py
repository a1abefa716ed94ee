"""Tell trackers of runs that lie in their folders: what they missed while a command trained, or all of it."""

from raytune.config.sections.tracking import TrackingSection
from raytune.errors import EXIT_RETRY_LATER, RaytuneError, UserError
from raytune.launch.attempts.lease import hold
from raytune.launch.state.record import RunRecord, readable
from raytune.run_folder import RunFolder, SweepFolder
from raytune.storage import absolute, exists, read_json
from raytune.tracking.trackers import LIBRARIES, refuse_unready
from raytune.tracking.watching import tell_now


class TrackersAwayError(RaytuneError):
    """A tracker does not take what it is told."""

    exit_code = EXIT_RETRY_LATER


def track(path: str, section: TrackingSection | None = None) -> list[str]:
    """Tell the trackers of a run or a sweep everything that they do not know.

    Args:
        path: its folder.
        section: instead of what its config says.

    Returns:
        What was told whom, in sentences.

    Raises:
        UserError: if there is no such run, or none of its trackers can be told anything.
        RunHeldError: if a command is at work on it, which tells them itself.
        TrackersAwayError: if one of them does not take it.
    """
    parent, _, name = absolute(path).rpartition("/")
    folder, sweep = RunFolder(parent, name), SweepFolder(parent, name)
    is_sweep = exists(sweep.sweep)
    if section is None:
        section = _section_of(folder, read_json(sweep.sweep) if is_sweep else None)
    elif not is_sweep:
        _section_of(folder, None)
    if not section.chosen:
        raise UserError(f"{folder.path} names no tracker. Name one, for example: raytune track {path} tracking=tensorboard")
    refuse_unready(section, folder.storage)
    with hold(folder):
        left = {name: why for name, why in tell_now(section, folder, is_sweep=is_sweep).items() if why is not None}
    if left:
        raise TrackersAwayError(
            "\n".join(f"{LIBRARIES[name].words} does not know everything of {folder.name}: {why}" for name, why in left.items())
        )
    return [f"{LIBRARIES[name].words} knows everything of {folder.name}." for name in section.chosen]


def _section_of(folder: RunFolder, config: dict | None) -> TrackingSection:
    """What the config of a run, or the one given of a sweep, says about trackers."""
    if config is None:
        record = RunRecord.read(folder)
        if record is None:
            raise UserError(f"{folder.path} is no folder of a run or a sweep: it holds no run.json. Name the folder of one.")
        config = record.config
    with readable(folder.run, folder):
        return TrackingSection.model_validate(config.get("tracking", {}))
