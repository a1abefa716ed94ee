"""`evaluation`: what is measured on held-out rows, and when."""

from typing import Annotated, Literal

from pydantic import Field

from raytune.config.data import Sources
from raytune.config.section import Auto, PositiveFloat, PositiveInt, Section

AnswerMetricName = Literal[
    "exact_match",
    "token_f1",
    "numeric_match",
    "json_valid",
    "json_fields",
    "accuracy",
    "macro_precision",
    "macro_recall",
    "macro_f1",
    "bleu",
    "chrf",
    "rouge1",
    "rouge2",
    "rougeL",
]


class GenerationSection(Section):
    """Answers written by the model and compared with the data, at the end of the run: base against tuned."""

    rows: Sources
    """Rows whose last assistant turn is the expected answer: one source or a list."""
    max_rows: PositiveInt = 200
    """Rows that are answered."""
    max_new_tokens: PositiveInt = 256
    """Longest answer, in tokens."""
    batch_size: PositiveInt = 32
    """Answers written at once by one worker."""
    metrics: Annotated[list[AnswerMetricName], Field(min_length=1, examples=[["numeric_match", "rougeL"]])] = ["exact_match"]
    """What the answers are worth beside those that the data expects: `exact_match`, `token_f1` (SQuAD), `numeric_match` (the last
    number), `json_valid`, `json_fields`; for classes `accuracy`, `macro_precision`, `macro_recall`, `macro_f1`; with the extra
    `metrics` also `bleu`, `chrf`, `rouge1`, `rouge2`, `rougeL`."""


class EvaluationSection(Section):
    every_steps: PositiveInt | Auto = "auto"
    """Steps between two evaluations on the validation rows. `auto`: ten over the run. The last step is always evaluated,
    and what `checkpoint.every_steps` saves, unless one of the two numbers divides the other."""
    every_epochs: Annotated[PositiveFloat, Field(examples=[0.5])] | None = None
    """Passes over the training rows between two evaluations, instead of `every_steps`: each is made after the first step at which
    its share of the rows is trained."""
    at_start: bool = True
    """Evaluate before the first step, so that the curve begins at the base model."""
    max_rows: PositiveInt | None = None
    """Evaluate on the first packed rows only."""
    generation: GenerationSection | None = None
    """Compare generated answers of base and tuned model after training."""
