"""What a range test of learning rates has found: a value, as lines for people, as JSON, and as a table. Neither torch nor ray."""

import json
from dataclasses import dataclass
from typing import Any

from raytune.metrics.json_numbers import encode_number
from raytune.plan.rates.rate_advice import RateAdvice
from raytune.plan.rates.rate_range import RateRange, Stop, reason_to_stop, smoothed
from raytune.run_folder import RatesFolder

MOST_SHOWN = 10
"""Points of a curve that people read as numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRate:
    """What a range test measured, and what that says.

    Attributes:
        name: of the run.
        folder: where the curve lies.
        key: of the config, under which the run has its rate.
        rate: that the run would have without it.
        losses: mean over the targets of each step's global batch, before its update; the last may not be finite.
        failure: where a loss or gradient was not finite, with the rows; None: nowhere.
        num_epochs: passes of the whole range over the training rows.
        cautions: why the curve may mislead, in sentences.
    """

    name: str
    folder: str
    key: str
    rate: float
    tried: RateRange
    losses: tuple[float, ...]
    failure: str | None
    advice: RateAdvice
    num_epochs: float
    cautions: tuple[str, ...]

    @property
    def rates(self) -> list[float]:
        """Of each step."""
        return [self.tried.rate(step) for step in range(len(self.losses))]

    @property
    def smoothed(self) -> list[float]:
        return smoothed(self.losses, self.tried.smoothing)

    @property
    def stop(self) -> Stop | None:
        return reason_to_stop(self.losses, self.tried)

    @property
    def suggestion(self) -> float | None:
        """The rate that `--apply` writes; None where the curve names none."""
        return self.advice.steepest

    @property
    def points(self) -> list[tuple[float, float, float]]:
        """Rate, loss and smoothed loss at a few steps, from the first to the last."""
        last = MOST_SHOWN - 1
        shown = sorted({round(share * (len(self.losses) - 1) / last) for share in range(MOST_SHOWN)})
        rates, averages = self.rates, self.smoothed
        return [(rates[step], self.losses[step], averages[step]) for step in shown]

    @property
    def lines(self) -> list[str]:
        """What a person reads: a few points of the curve, what they say, and the rates."""
        advice = self.advice
        return [
            f"{'learning rate':>13}  {'loss':>9}  {'smoothed':>9}",
            *(f"{rate:>13.2e}  {loss:>9.4f}  {average:>9.4f}" for rate, loss, average in self.points),
            advice.words,
            *([self.failure] if self.failure and not advice.is_found else []),
            *(f"caution: {caution}" for caution in self.cautions),
            *(
                [
                    f"suggested  {advice.steepest:.1e}  (steepest descent)",
                    f"safe       {advice.safe:.1e}  (at most a tenth of {advice.lowest:.1e}, where the loss was lowest)",
                ]
                if advice.is_found
                else ["suggested  none"]
            ),
            f"the run's  {self.rate:.1e}  ({self.key})",
            f"curve      {self._place.rates}",
        ]

    @property
    def _place(self) -> RatesFolder:
        root, _, name = self.folder.rpartition("/")
        return RatesFolder(root.removesuffix("/rates"), name)

    def to_json(self) -> dict[str, Any]:
        """The facts without the curve, which is in rates.jsonl."""
        return {
            "name": self.name,
            "folder": self.folder,
            "key": self.key,
            "rate": self.rate,
            "suggestion": self.suggestion,
            "advice": self.advice.model_dump(mode="json"),
            "cautions": list(self.cautions),
            "stop": self.stop,
            "failure": self.failure,
            "num_steps": len(self.losses),
            "num_epochs": self.num_epochs,
            "range": self.tried.model_dump(mode="json"),
        }

    def table(self) -> bytes:
        """A line per step: `{"step", "learning_rate", "loss", "smoothed"}`."""
        rows = zip(self.rates, self.losses, self.smoothed, strict=True)
        return b"".join(
            json.dumps(
                {"step": step, "learning_rate": rate, "loss": encode_number(loss), "smoothed": encode_number(average)}
            ).encode()
            + b"\n"
            for step, (rate, loss, average) in enumerate(rows, 1)
        )
