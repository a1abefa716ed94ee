"""Where Ray Tune gets its trials from: a list that was drawn beforehand, or Optuna.

Both first give out again what an earlier command of the sweep has assigned and not ended: such a trial then reports what it has
measured before, and goes on where it stood. Optuna is told of the ended ones directly.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from ray.tune.search import Searcher

from raytune.config.sections.run import RunConfig
from raytune.sweeps.space import draw, space_of
from raytune.sweeps.trial import Trial

TRIAL = "trial"
"""Key of a trial's name in its Tune config, beside the values."""


class Source(Protocol):
    """Makes up the trials that nobody has assigned yet."""

    def next(self, number: int) -> Trial | None:
        """The trial of this number; None: there are no more."""
        ...

    def again(self, trial: Trial) -> None:
        """Take note of a trial that an earlier command has made up."""
        ...

    def finished(self, trial: Trial, value: float | None) -> None:
        """Take note of what a trial came to; None: it failed."""
        ...


class Listed:
    """Trials that were drawn beforehand."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._trials = trials

    def next(self, number: int) -> Trial | None:
        return self._trials[number] if number < len(self._trials) else None

    def again(self, trial: Trial) -> None:
        pass

    def finished(self, trial: Trial, value: float | None) -> None:
        pass


class Optuna:
    """Trials that Optuna's sampler (TPE) proposes from the values of the ones before.

    Args:
        config: of the sweep.
        num_known: trials that earlier commands have assigned.
    """

    def __init__(self, config: RunConfig, num_known: int = 0) -> None:
        import optuna

        assert config.sweep is not None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        direction = "minimize" if config.sweep.mode == "min" else "maximize"
        # Known trials draw nothing, so a resumed sampler of the same seed would propose the first points again.
        sampler = optuna.samplers.TPESampler(seed=config.sweep.seed + num_known)
        self._study = optuna.create_study(sampler=sampler, direction=direction)
        self._failed = optuna.trial.TrialState.FAIL
        self._space, self._num_trials = space_of(config), config.sweep.trials
        self._first = [dict(point) for point in config.sweep.first]
        self._asked: dict[int, Any] = {}

    def next(self, number: int) -> Trial | None:
        if number >= self._num_trials:
            return None
        given = self._first[number] if number < len(self._first) else {}
        return Trial(number=number, values=self._drawn(number, given))

    def again(self, trial: Trial) -> None:
        self._drawn(trial.number, trial.values)

    def finished(self, trial: Trial, value: float | None) -> None:
        asked = self._asked.pop(trial.number)
        if value is None:
            self._study.tell(asked, state=self._failed)
        else:
            self._study.tell(asked, value)

    def _drawn(self, number: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """A point through Optuna's hands, with the values that are given already."""
        if given:
            self._study.enqueue_trial({key: _category(value) for key, value in given.items()})
        asked = self._asked[number] = self._study.ask()
        return draw(self._space, _OptunaChooser(asked))


class _OptunaChooser:
    """Draws through Optuna, which so learns the space as it is walked."""

    def __init__(self, asked: Any) -> None:
        self._asked = asked

    def choice(self, key: str, options: Sequence[Any]) -> Any:
        # Optuna wants plain values for categories: lists and mappings are named by their text.
        by_name = {_category(option): option for option in options}
        return by_name[self._asked.suggest_categorical(key, list(by_name))]

    def number(self, key: str, low: float, high: float, step: float | None, is_log: bool, is_integer: bool) -> float:
        if is_integer:
            return self._asked.suggest_int(key, int(low), int(high), step=int(step or 1), log=is_log)
        return self._asked.suggest_float(key, low, high, step=step, log=is_log)


def _category(option: Any) -> Any:
    return option if option is None or isinstance(option, bool | int | float | str) else json.dumps(option, sort_keys=True)


class TrialSearch(Searcher):
    """Hands trials to Ray Tune, each with its assignment written before Tune hears of it.

    Args:
        known: trials of earlier commands that have not ended, in their order.
        first_number: of the trials that nobody has assigned yet.
        assign: writes what a trial is to follow; called on the driver. Returns whether it can be built.
        value_of: the value of the metric that a trial has come to; None where it failed.
    """

    def __init__(
        self,
        source: Source,
        known: Sequence[Trial],
        first_number: int,
        assign: Callable[[Trial], bool],
        value_of: Callable[[Trial], float | None],
    ) -> None:
        super().__init__()
        self._source, self._assign, self._value_of = source, assign, value_of
        self._again: Iterator[Trial] = iter(known)
        self._number = first_number
        self._running: dict[str, Trial] = {}

    def __reduce__(self) -> tuple:
        return Searcher, ()  # as for schedulers (schedule.py)

    def suggest(self, trial_id: str) -> Any:
        while (trial := self._next()) is not None:
            if self._assign(trial):
                self._running[trial_id] = trial
                return {TRIAL: trial.name, **trial.values}
            self._source.finished(trial, None)
        return Searcher.FINISHED

    def _next(self) -> Trial | None:
        trial = next(self._again, None)
        if trial is not None:
            self._source.again(trial)
            return trial
        trial = self._source.next(self._number)
        self._number += 1
        return trial

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        trial = self._running.pop(trial_id, None)
        if trial is not None:  # Tune says it twice of some
            self._source.finished(trial, None if error else self._value_of(trial))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called: a sweep resumes from its ledger."""
