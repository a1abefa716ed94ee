"""What a plan has to know of the data: the tokenised stores, and what was learned in building them."""

from dataclasses import dataclass

from raytune.plan.data.data_report import DataReport
from raytune.plan.data.streaming import StreamPlan
from raytune.plan.run_plan import StorePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """The tokenised stores of a run, and what was learned in building them."""

    train: StorePlan
    validation: tuple[StorePlan, ...] = ()
    test: tuple[StorePlan, ...] = ()
    ewc: StorePlan | None = None
    """What the importance of weights is estimated from, a document per row; None without EWC."""
    longest_document: int
    """Tokens of the longest document that is trained, or that importance is estimated from."""
    template: str = ""
    """Text of the chat template that made them; empty for plain text."""
    report: DataReport | None = None
    """What became of the rows; None where they were not read."""
    stream: StreamPlan | None = None
    """As of `DataPlan`."""
    assumption: str = ""
    """A sentence about stores that do not exist yet: what they were taken to hold."""
