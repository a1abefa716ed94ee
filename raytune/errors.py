"""The kinds of error that raytune raises on purpose. Every one survives pickling, because most cross a Ray process border."""

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_RETRY_LATER = 10


class RaytuneError(Exception):
    """Something went wrong that we can name: the message says what, where, why and what to do about it."""

    exit_code = EXIT_FAILED


class UserError(RaytuneError):
    """What the user asked for cannot be done as written; nothing was started.

    Args:
        message: names keys as they are written in a config.
        keys: that caused it, the first one first; without any, those that the message names.
    """

    exit_code = EXIT_REFUSED

    def __init__(self, message: object = "", *, keys: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys
        self.place = ""
        """Where the key was written, such as `run.yaml:4:3  data.max_length`, once that is known (`config.words.places`)."""

    def __str__(self) -> str:
        return f"{self.place}\n{super().__str__()}" if self.place else super().__str__()


class PlanError(UserError):
    """The run does not fit the machines it was planned for; the message names the nearest settings that do."""


class DataError(UserError):
    """The data cannot be read, or holds rows that cannot be trained on."""


class ModelError(UserError):
    """The model, its tokenizer or its adapter cannot be used as asked."""


class CheckpointError(RaytuneError):
    """A checkpoint is missing, torn, or belongs to another run."""


class UnfitCheckpointError(CheckpointError):
    """An intact checkpoint does not fit what it is to be loaded into, by settings, division or libraries; another attempt meets
    it again."""


class TakenOverError(CheckpointError):
    """A newer attempt at the same run has begun; this one may write no more and is not to be tried again."""


class StorageFullError(CheckpointError):
    """There is no room for what must be written; the same attempt would only fill the disk again."""


class RunHeldError(RaytuneError):
    """Another command is at work on the same run; running this one when it has ended can succeed."""

    exit_code = EXIT_RETRY_LATER


class TrainingError(RaytuneError):
    """Training itself failed: a loss that is not finite, for example. The message names step and rank."""

    bad_step: int | None = None
    """First step that went wrong, counted from 1; None where it is not known, or no step is to blame."""


class ClusterError(RaytuneError):
    """The cluster could not be reached, or lost what the run needs; running the same command later can succeed."""

    exit_code = EXIT_RETRY_LATER


def capitalised(text: str) -> str:
    """The beginning of a sentence; a key that it begins with stays as it is written."""
    return text if "." in text.split()[0] else text[:1].upper() + text[1:]
