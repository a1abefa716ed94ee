"""`evaluation`: what is measured on held-out rows, and when."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from raytune.config.sections.data import Sources, source_name
from raytune.config.sections.section import Auto, NonNegativeInt, PositiveFloat, PositiveInt, Section, Text
from raytune.config.sections.user_code import CodeName
from raytune.config.sections.while_training import WhileTrainingSection
from raytune.metrics.points import NOT_OF_SUITES

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
ChoiceMetricName = Literal["accuracy", "accuracy_per_character", "macro_precision", "macro_recall", "macro_f1"]
LossMetricName = Literal["loss", "perplexity"]
SuiteMetricName = Literal[AnswerMetricName, "bertscore", ChoiceMetricName, LossMetricName]
SuiteKind = Literal["answers", "choices", "labels", "loss", "lm_eval"]
TaskMetricName = Annotated[
    Text,
    Field(
        pattern=r"^[^\s:/]+$", title="a metric's name without spaces, : and /", examples=["acc_norm", "exact_match,strict-match"]
    ),
]
"""As lm_eval prints it: of a task with several filters followed by the filter's name."""

METRICS_OF: Mapping[SuiteKind, Sequence[str]] = {
    "answers": (*get_args(AnswerMetricName), "bertscore"),
    "choices": ("accuracy", "accuracy_per_character"),
    "labels": get_args(ChoiceMetricName),
    "loss": get_args(LossMetricName),
    "lm_eval": (),
}
"""What a suite of a kind can be judged by; `answers` also by functions of the user's. A task of lm_eval has its own metrics."""
DEFAULT_METRICS: Mapping[SuiteKind, Sequence[str]] = {
    "answers": ("exact_match",),
    "choices": ("accuracy", "accuracy_per_character"),
    "labels": ("accuracy", "macro_f1"),
    "loss": ("loss", "perplexity"),
    "lm_eval": (),
}
GENERATION = "generation"
"""Name of the suite that `evaluation.generation` is short for."""

LOWER_IS_BETTER = get_args(LossMetricName)

SUITE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

Rows = Annotated[Sources, Field(min_length=1)]


class BertScoreSection(Section):
    """Which model the metric `bertscore` compares texts by."""

    model: Annotated[Text, Field(examples=["models/deberta-xlarge-mnli"])]
    """Folder with the files of an encoder, on every node."""
    layer: Annotated[PositiveInt, Field(examples=[40])]
    """Whose output is compared: the layers up to it are run. bert-score lists the best one of many models."""


class GenerationSection(Section):
    """Answers written by the model and compared with the data, at the end of the run: base against tuned. Short for a suite of
    `evaluation.suites` that is called `generation`."""

    rows: Rows
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
    `metrics` also `bleu`, `chrf`, `rouge1`, `rouge2`, `rougeL`. Functions of your own, and more, are for `evaluation.suites`."""


class SuiteSection(Section):
    """Rows that base and tuned model are measured on at the end of the run, beside each other."""

    name: Annotated[str, Field(pattern=SUITE_NAME, title="a name of letters, digits and . _ -")] | None = None
    """What it is called in tables and results. Default: the name of its first source, or of its task."""
    kind: SuiteKind = "answers"
    """`answers`: the model writes, and what it wrote is compared with the last assistant turn. `choices`: the likeliest of a
    row's choices is its answer; rows have `question`, `choices` and `answer` (a place from 0, or the text or letter of a choice).
    `labels`: the likeliest of all answers that the rows expect, which are few. `loss`: what the model forgets: its loss on rows
    of general data, as on validation rows. `lm_eval`: a task of lm_eval (lm-evaluation-harness), whose files say where its rows
    are, how they are asked and what answers are worth; it comes with the extra `lm-eval`."""
    rows: Sources = []
    """One source or a list. Every kind has some but `lm_eval`."""
    task: Annotated[Text, Field(examples=["my_task"])] | None = None
    """Name of a task of lm_eval, as its YAML says it."""
    task_folder: Annotated[Text, Field(examples=["tasks"])] | None = None
    """Folder with the YAML of the task, what that includes, and the Python files of its functions, which are run as your own.
    They go to the workers; the rows are read where the command is given."""
    num_fewshot: NonNegativeInt | None = None
    """Rows that lm_eval shows with their answers before the one that is asked. Default: as many as the task says."""
    max_rows: PositiveInt = 200
    """Rows that are used, the first ones."""
    metrics: Annotated[
        list[SuiteMetricName | CodeName | TaskMetricName] | None,
        Field(min_length=1, examples=[["numeric_match", "rougeL"]]),
    ] = None
    """Of `answers` those of `evaluation.generation.metrics`, `bertscore`, and functions of your own (`my_metrics.py:closeness`),
    which are called with an answer and the expected one and give a number. Of `choices` `accuracy` (by the sum of
    log-probabilities) and `accuracy_per_character`; of `labels` also `macro_precision`, `macro_recall`, `macro_f1`; of `loss`
    `loss` and `perplexity`. Default: `exact_match`; both; `accuracy` and `macro_f1`; both. Of `lm_eval` some of the task's own,
    which have to be named."""
    system: Text | None = None
    """A system message that is put before each row; rows have none of their own then."""
    examples: Sources = []
    """Rows that are shown with their answers before the one that is asked, as turns of the same conversation (few-shot)."""
    num_examples: PositiveInt | None = None
    """Of the examples, how many are shown: the first ones that are not the asked row itself. Default: all of them."""
    batch_size: PositiveInt = 32
    """Rows, or choices of rows, that one worker passes through the model at once, at most. No result depends on it."""
    max_new_tokens: PositiveInt = 256
    """Longest answer, in tokens."""
    num_beams: PositiveInt = 1
    """Beams of a search for the likeliest answer; 1: none, token by token."""
    temperature: Annotated[PositiveFloat, Field(examples=[0.7])] | None = None
    """Draw answers at this temperature. Default: the likeliest token each time (greedy)."""
    top_k: PositiveInt | None = None
    """Draw among the k likeliest tokens only."""
    top_p: Annotated[float, Field(gt=0, le=1, examples=[0.95])] | None = None
    """Draw among the likeliest tokens only that have this probability together."""
    seed: NonNegativeInt = 0
    """What is drawn for a row depends on this and on its number, not on batches or workers."""
    bertscore: BertScoreSection | None = None
    """The model of the metric `bertscore`, which comes with the extra `bertscore`."""

    @field_validator("rows")
    @classmethod
    def _are_some(cls, rows: list, info: ValidationInfo) -> list:
        if not rows and info.data.get("kind", "lm_eval") != "lm_eval":  # without a kind that is the fault
            raise ValueError("a suite has rows that are asked: one source or a list, as in `rows: held_out.jsonl`")
        return rows

    @model_validator(mode="after")
    def _reads_rows(self) -> "SuiteSection":
        if self.rows and self.kind == "lm_eval":
            raise ValueError("a task of lm_eval has rows of its own, which its YAML names; leave rows out")
        if self.examples and self.kind in ("loss", "lm_eval"):
            raise ValueError(f"a suite of kind {self.kind} shows no examples; leave them out")
        return self

    @model_validator(mode="after")
    def _has_task(self) -> "SuiteSection":
        if self.kind == "lm_eval":
            named = {"task": self.task, "task_folder": self.task_folder, "metrics": self.metrics}
            if missing := [name for name, value in named.items() if value is None]:
                raise ValueError(
                    f"a suite of kind lm_eval names {', '.join(missing)} too, as in `{{kind: lm_eval, task: my_task, "
                    f"task_folder: tasks, metrics: [acc]}}`"
                )
        return self

    @field_validator("metrics")
    @classmethod
    def _kind_has_them(cls, metrics: list[str] | None, info: ValidationInfo) -> list[str] | None:
        kind = info.data.get("kind", "lm_eval")  # wrong itself, or of which the metrics are the task's, which is not read yet
        known = METRICS_OF.get(kind, ())
        for metric in () if kind == "lm_eval" else metrics or ():
            if metric not in known and not (is_code(metric) and kind == "answers"):
                near = get_close_matches(metric, known, 1)
                hint = f'. Did you mean "{near[0]}"?' if near else f"; it has {', '.join(known)}"
                raise ValueError(f"a suite of kind {kind} has no metric {metric}{hint}")
        return metrics

    @model_validator(mode="after")
    def _can_be_judged(self) -> "SuiteSection":
        if "bertscore" in self.named_metrics and self.bertscore is None:
            raise ValueError(
                "bertscore compares texts by a model; name one in the suite, for example "
                "`bertscore: {model: models/roberta-large, layer: 17}`"
            )
        return self

    @property
    def title(self) -> str:
        return self.name or self.task or source_name(self.rows[0])

    @property
    def named_metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.metrics or DEFAULT_METRICS[self.kind]))


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
    suites: Annotated[list[SuiteSection], Field(examples=[[{"rows": "held_out.jsonl"}]])] = []
    """Measured on base and tuned model after training, several of them: written answers, multiple choice, classes, and what is
    forgotten of general data (`raytune explain scores`)."""
    while_training: WhileTrainingSection | None = None
    """Measure suites while training goes on as well. Default: only after it."""

    @field_validator("suites")
    @classmethod
    def _names_differ(cls, suites: list[SuiteSection], info: ValidationInfo) -> list[SuiteSection]:
        names = [GENERATION] * bool(info.data.get("generation")) + [suite.title for suite in suites]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two suites are called {twice!r}; give one of them another name (evaluation.suites.name)")
        return suites

    @field_validator("while_training")
    @classmethod
    def _are_there(cls, section: WhileTrainingSection | None, info: ValidationInfo) -> WhileTrainingSection | None:
        if section is None or not {"generation", "suites"} <= info.data.keys():
            return section
        names = [GENERATION] * bool(info.data["generation"]) + [suite.title for suite in info.data["suites"]]
        if not names:
            raise ValueError("there are no suites to measure; give some (evaluation.suites), or leave while_training out")
        if unknown := next((name for name in section.suites if name not in names), None):
            raise ValueError(f"no suite is called {unknown!r}; these are there: {', '.join(names)}")
        if taken := next((name for name in section.suites or names if name in NOT_OF_SUITES), None):
            raise ValueError(
                f"a suite is called {taken!r}, as other metrics are; give it another name (evaluation.suites.name) to have it "
                f"measured while training goes on"
            )
        return section


def suites_of(section: EvaluationSection) -> dict[str, SuiteSection]:
    """What is asked of base and tuned model, by the key of a config that asks for it."""
    generation = section.generation
    short = {"evaluation.generation": suite_of_generation(generation)} if generation else {}
    return short | {f"evaluation.suites.{number}": suite for number, suite in enumerate(section.suites)}


def suites_while_training(section: EvaluationSection) -> dict[str, SuiteSection]:
    """Those that are measured while training goes on, by the key of a config that asks for them."""
    if section.while_training is None:
        return {}
    chosen = section.while_training.suites
    return {key: suite for key, suite in suites_of(section).items() if not chosen or suite.title in chosen}


def suite_of_generation(section: GenerationSection) -> SuiteSection:
    return SuiteSection(name=GENERATION, **{name: getattr(section, name) for name in GenerationSection.model_fields})


def code_of_suite(suite: SuiteSection) -> list[str]:
    """Functions of the user's that a suite is judged by."""
    return [name for name in suite.named_metrics if is_code(name)]


def is_code(metric: str) -> bool:
    """Whether a metric is a function of the user's."""
    return ":" in metric
