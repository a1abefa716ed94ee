"""Which trials Ray Tune lets go on: our asynchronous halving, or its own Hyperband and median rule, all behind the same guard.

The guard is what Ray's schedulers lack: a trial whose metric is not finite fails at once, an error that would only come again is
not tried again, and whatever is decided is in the ledger before it happens.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, HyperBandScheduler, MedianStoppingRule, TrialScheduler

from raytune.sweeps.board import Board
from raytune.sweeps.halving import RungDecision, Verdict
from raytune.sweeps.ledger import Decided, Ended, Ledger, end_of
from raytune.sweeps.search import TRIAL
from raytune.sweeps.sweep_plan import SweepPlan

AMOUNT, STEP, FAILURE, MAY_PASS = "amount", "step", "failure", "may_pass"
"""Keys of a trial's results beside its metrics: training so far in rounds of `grace`, the step, why it failed, and whether that
may pass."""


class _Guard:
    """What every scheduler does before it decides, and after."""

    def __init__(self, plan: SweepPlan, ledger: Ledger, board: Board, **settings: Any) -> None:
        super().__init__(**settings)
        self._plan, self._ledger, self._board = plan, ledger, board

    def __reduce__(self) -> tuple:
        # Tune pickles schedulers for `Tuner.restore`, which a sweep with a ledger has no use for.
        return FIFOScheduler, ()

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: Mapping[str, Any]) -> str:
        name = trial.config[TRIAL]
        if FAILURE in result:
            trial.max_failures = 0  # its own attempts are spent: Tune, which counts dead actors, is not to start it again
            self._ledger.end(name, Ended(state="failed", cause=result[FAILURE], is_final=not result[MAY_PASS]))
            return TrialScheduler.CONTINUE  # and its next word is the error
        value = float(result[self._plan.metric])
        self._board.heard(name, result[STEP], value)
        against = self._ledger.known.verdict_on(name)
        if against is not None:  # decided by an earlier command
            return TrialScheduler.STOP if result[STEP] >= against.step else TrialScheduler.CONTINUE
        if not math.isfinite(value):
            self._note(name, result, value, RungDecision(Verdict.FAIL))
            return TrialScheduler.STOP
        if result[AMOUNT] >= self._plan.budget:
            return TrialScheduler.CONTINUE  # it has trained to its end, and still writes its model
        return self._decided(tune_controller, trial, result, value)

    def _decided(self, tune_controller: Any, trial: TuneTrial, result: Mapping[str, Any], value: float) -> str:
        """Let Tune's scheduler decide, and note it."""
        action = super().on_trial_result(tune_controller, trial, result)  # pyright: ignore[reportAttributeAccessIssue]
        verdict = Verdict.STOP if action == TrialScheduler.STOP else Verdict.GO_ON
        self._note(trial.config[TRIAL], result, value, RungDecision(verdict, rung=self._plan.rung_at(result[AMOUNT])))
        return action

    def _note(self, name: str, result: Mapping[str, Any], value: float, decision: RungDecision) -> None:
        decided = Decided(trial=name, step=result[STEP], amount=result[AMOUNT], value=value, decision=decision)
        self._ledger.decide(decided)
        if decision.verdict is not Verdict.GO_ON:
            self._ledger.end(name, end_of(decided, self._plan.metric))


class _Asha(_Guard, FIFOScheduler):
    """Our halving; the standings are those of the ledger, so a resumed sweep judges as if it had not stopped."""

    def __init__(self, plan: SweepPlan, ledger: Ledger, board: Board) -> None:
        super().__init__(plan, ledger, board)
        self._standings = ledger.known.standings

    def _decided(self, tune_controller: Any, trial: TuneTrial, result: Mapping[str, Any], value: float) -> str:
        name = trial.config[TRIAL]
        decision = self._plan.halving.decide(self._standings, name, result[AMOUNT], value)
        if decision.rung is not None:
            self._note(name, result, value, decision)
        return TrialScheduler.STOP if decision.verdict is Verdict.STOP else TrialScheduler.CONTINUE


class _HyperBand(_Guard, HyperBandScheduler):
    """Ray Tune's Hyperband (Li et al. 2018): brackets of different patience; trials wait at a rung for the others of theirs."""

    def __init__(self, plan: SweepPlan, ledger: Ledger, board: Board) -> None:
        super().__init__(
            plan, ledger, board, time_attr=AMOUNT, max_t=max(1, math.ceil(plan.budget)), reduction_factor=plan.reduction_factor
        )


class _Median(_Guard, MedianStoppingRule):
    """Ray Tune's median rule (Golovin et al. 2017): a trial worse than the median of the others' averages ends."""

    def __init__(self, plan: SweepPlan, ledger: Ledger, board: Board) -> None:
        super().__init__(plan, ledger, board, time_attr=AMOUNT, grace_period=1)


class _Fifo(_Guard, FIFOScheduler):
    """Every trial trains to its end, unless its metric is not finite."""


_SCHEDULERS: dict[str, Callable[[SweepPlan, Ledger, Board], TrialScheduler]] = {
    "asha": _Asha,
    "hyperband": _HyperBand,
    "median": _Median,
    "none": _Fifo,
}


def make_scheduler(plan: SweepPlan, ledger: Ledger, board: Board) -> TrialScheduler:
    """The scheduler of a sweep, as Ray Tune calls it. It hears every result first, and so keeps the board."""
    return _SCHEDULERS[plan.stopping](plan, ledger, board)
