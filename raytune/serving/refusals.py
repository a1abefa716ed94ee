"""What an engine says to those whom it cannot serve."""

from raytune.errors import EXIT_RETRY_LATER, ModelError, RaytuneError, UserError


class NotKnownError(UserError):
    """The engine has no model of that name."""


class TooLongError(UserError):
    """A prompt, with as many tokens as are asked for, does not fit the model or the memory."""


class FullError(RaytuneError):
    """As many requests wait as may; the same one later can succeed."""

    exit_code = EXIT_RETRY_LATER


class AnswerFailedError(RaytuneError):
    """The model could not go on with an answer; the engine goes on with others."""


class UnfitError(ModelError):
    """A model cannot be served beside those that the engine has."""


class EngineDeadError(RaytuneError):
    """The engine has ended, or is closed; only a new one answers."""
