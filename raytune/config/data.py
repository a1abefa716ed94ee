"""`data`: the rows, how they become conversations, tokens, targets and packed rows."""

import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from raytune.config.section import Auto, Fraction, PositiveFloat, PositiveInt, Section, Text

DataFormat = Literal[
    "messages", "sharegpt", "alpaca", "question_answer", "classification", "summarisation", "prompt_completion", "text"
]
FILE_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".feather")
"""Of files with rows; what has none of them is a folder, or a data set of a hub."""
COMPRESSED_ENDINGS = (".gz", ".bz2", ".xz", ".zst")
"""Behind the ending of a file of text."""
Role = Literal["system", "user", "assistant", "tool"]


def _names_of_labels(value: object) -> object:
    if isinstance(value, list):
        return {str(number): name for number, name in enumerate(value)}
    if isinstance(value, dict):
        return {str(label).lower() if isinstance(label, bool) else str(label): name for label, name in value.items()}
    return value


class DataSource(Section):
    """One set of rows."""

    path: Annotated[Text, Field(examples=["rows.jsonl"])]
    """File (json, jsonl, csv, tsv, txt, also as gz, bz2, xz or zst; parquet, arrow), glob, folder of such files or of
    `save_to_disk`, hub data set id, s3:// gs:// abfs:// URL, or `demo:train`, `demo:validation`, `demo:test` for the built-in
    task."""
    name: Text | None = None
    """Name of the data set in metrics and reports. Default: the last part of the path, without its ending."""
    format: DataFormat | Auto = "auto"
    """How a row is read. `auto` recognises it by its columns, and refuses to guess when more than one format fits or a column
    that may matter (a label, images, ...) would be left unread; with a named format such columns are counted and said."""
    split: Text = "train"
    """Split of a hub data set or a folder: one of `save_to_disk`, or of files whose names say which split they are of."""
    columns: dict[str, Text] = {}
    """Other column names: the format's field -> the column in the file, or the path to it through objects and lists, for example
    `{prompt: question, completion: meta.answers.0}`."""
    constants: Annotated[dict[str, Text], Field(examples=[{"system": "Answer in one word."}])] = {}
    """Fields of the format that are the same in every row: field -> its text, for example `{instruction: Summarise this.}`."""
    labels: Annotated[
        dict[str, Text],
        BeforeValidator(_names_of_labels, json_schema_input_type=list[str] | dict[str, str]),
        Field(title="a list of names, or label -> name", examples=[["negative", "positive"]]),
    ] = {}
    """What the labels of the format `classification` are called: a list for numbers from 0, or label -> name. The name is the
    answer that is trained; a label that is a number needs one."""
    max_rows: PositiveInt | None = None
    """Read the first rows only."""

    @model_validator(mode="after")
    def _is_said_once(self) -> "DataSource":
        if twice := sorted(self.columns.keys() & self.constants.keys()):
            raise ValueError(f"{twice[0]} is in columns and in constants: it is either read from each row or the same in all")
        return self


class TrainSource(DataSource):
    """One set of training rows, and how much it counts among several."""

    loss_weight: PositiveFloat = 1.0
    """How much each of its targets counts in the loss, against those of other sources: 0.2 for general text beside a domain, say.
    Multiplied by what a row gives its turns (`weight`). A source that is to count nothing is left out."""
    proportion: Annotated[PositiveFloat | None, Field(examples=[3.0])] = None
    """Its part of the targets of an epoch, against the parts of the other sources, each of which needs one: 3 beside 1 is three
    quarters. `mixing.until` says which rows are repeated or left out for that."""


class MixingSection(Section):
    """How much an epoch has of each of several training sources, where that is not each row once."""

    temperature: Annotated[float, Field(ge=0.01, examples=[2.0])] | None = None
    """Instead of a `proportion` per source: a source of n targets gets a part of n^(1 / temperature). 1: as many as it has; the
    higher, the more alike the parts are."""
    until: Literal["all_exhausted", "first_exhausted"] = "all_exhausted"
    """When an epoch ends: with `all_exhausted` when each row of each source was seen, those of others more than once; with
    `first_exhausted` when those of one source were, so that no row is seen twice, and some of the others' never."""


def _as_list(value: object) -> object:
    sources = value if isinstance(value, list) else [value]
    return [{"path": source} if isinstance(source, str) else source for source in sources]


Sources = Annotated[
    list[DataSource],
    BeforeValidator(_as_list, json_schema_input_type=str | DataSource | list[str | DataSource]),
    Field(title="a path, a source (path, format, ...), or a list of them", examples=["rows.jsonl"]),
]


def _all_or_none(sources: list[TrainSource]) -> list[TrainSource]:
    without = [source.path for source in sources if source.proportion is None]
    if 0 < len(without) < len(sources):
        raise ValueError(f"give each source a proportion, or none of them: {', '.join(without)} has none")
    return sources


TrainSources = Annotated[
    list[TrainSource],
    BeforeValidator(_as_list, json_schema_input_type=str | TrainSource | list[str | TrainSource]),
    AfterValidator(_all_or_none),
    Field(title="a path, a source (path, format, ...), or a list of them", examples=["rows.jsonl"]),
]


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"must be a regular expression ({error})") from error
    return text


class TokenWeightsSection(Section):
    """How much the tokens of some classes of text count in the training loss, as factors. Where a token is of several, all are
    multiplied, and with the `weight` of its turn. A token is of a class if one character of its text is."""

    numbers: PositiveFloat = 1.0
    """Of tokens that cover a digit."""
    code_syntax: PositiveFloat = 1.0
    """Of tokens in a fenced code block (three backticks or tildes) that cover a bracket, an operator, other punctuation of code
    or a keyword of a common language. White space, names, and what lies outside of blocks are not of it."""
    patterns: Annotated[
        dict[Annotated[Text, AfterValidator(_regex)], PositiveFloat], Field(examples=[{r"(?i)\byes\b|\bno\b": 3.0}])
    ] = {}
    """Of tokens that share a character with what a regular expression (Python's) finds in a trained piece of text: an answer with
    its end of turn, or all of a plain document."""


class StreamingSection(Section):
    """How training rows are streamed: tokenised by the workers while they train, for inputs that are larger than memory and disk.
    Nothing is written, and the steps are given by `training.max_steps`."""

    window: PositiveInt = 10_000
    """Rows that are shuffled and packed among themselves, in memory; the next so many are tokenised meanwhile. Where files hold
    rows of one kind one after another, shuffle the files, or name more rows."""


class DataSection(Section):
    train: TrainSources = [TrainSource(path="demo:train")]
    """Training rows: one source or a list. A plain string is a path. A run has to name them, unless `model.base` is `demo`."""
    mixing: MixingSection = MixingSection()
    """How often an epoch has the rows of each of several sources. Without a word here or in them: each row once."""
    validation: Sources = []
    """Rows for evaluation while training. Empty with `validation_fraction` 0: no evaluation."""
    validation_fraction: Fraction = 0.0
    """Share of the training rows that is held out for validation, chosen by a stable hash of the row's content. Those of several
    sources are measured as sets of their own too (`validation/NAME/loss`)."""
    template: Text = "auto"
    """Chat template: `auto` (the tokenizer's own), a shipped one (`chatml`, `llama-2`, `llama-3`, `mistral`, `gemma`,
    `qwen`, `alpaca`, `plain`), or the path of a Jinja file."""
    targets: Literal["completion", "assistant", "last", "all"] | list[Role] = "assistant"
    """Which tokens carry loss: `completion` and `assistant` (every assistant turn), `last` (the last assistant turn), `all` (the
    prompt too), or a list of roles. End-of-turn tokens of these turns are trained; padding never is, nor a turn whose row says
    `weight: 0` or `train: false`. Another `weight` of a turn (`0.5`, `3`) is how much each of its tokens counts in the loss."""
    token_weights: TokenWeightsSection = TokenWeightsSection()
    """Let tokens of some classes of text (digits, syntax of code, what patterns find) count more or less than others in the
    training loss; held-out rows are measured without, so that their loss stays comparable. The plan says how many there are."""
    max_length: PositiveInt | Auto = "auto"
    """Tokens per packed row, and the longest document. `auto`: 2048, or the model's limit where that is smaller."""
    too_long: Literal["truncate", "drop", "split", "error"] | Auto = "auto"
    """What happens to a longer document. `truncate` cuts the end and says how many rows lost trained tokens; `split` cuts it into
    several. `auto`: `split` for plain text, `truncate` for chats."""
    packing: Literal["best_fit", "token_budget", "none"] = "best_fit"
    """How documents share a row: `best_fit` (best-fit decreasing), `token_budget` (neighbours in length, up to `max_length`
    tokens) or `none` (a document per row). Documents never attend to each other and their loss does not depend on the choice.
    Models whose layers keep a state (LFM2, Qwen3-Next, Jamba, Nemotron-H, Mamba) need `none`: a document per forward pass."""
    on_bad_row: Literal["error", "skip"] = "error"
    """`error` lists the bad rows with file and line and stops; `skip` leaves them out and counts them."""
    on_prompt_mismatch: Literal["error", "accept"] = "error"
    """What happens where answers are trained behind other tokens than the template's prompt for them has (a tokenizer that takes
    a space of the prompt into the answer's first word, a prompt that opens a thought): `error` stops if that is so for more than
    2 % of the answers of a source that are compared, a sample, with examples; `accept` goes on. Both say how many."""
    streaming: StreamingSection | None = None
    """Train on rows without a store: of one source in files that every node mounts, in their order, shuffled by window."""
    store: Text | None = None
    """Folder of the tokenised stores, readable from every node. Default: `stores` beside the run folders."""

    @model_validator(mode="after")
    def _has_rows(self) -> "DataSection":
        if not self.train:
            raise ValueError("data.train needs at least one source")
        if self.validation and self.validation_fraction:
            raise ValueError("give data.validation or data.validation_fraction, not both")
        if self.validation_fraction == 1:
            raise ValueError("data.validation_fraction must leave rows to train on, got 1")
        return self


def ending_of(path: str) -> str:
    """What kind of file a path names, in small letters: its ending, or the one before that where it is compressed."""
    ending = PurePath(path).suffix.lower()
    return (PurePath(path).with_suffix("").suffix.lower() or ending) if ending in COMPRESSED_ENDINGS else ending


def source_name(source: DataSource) -> str:
    """Name of a source in metrics: as configured, else the last part of its path without its ending."""
    if source.name is not None:
        return source.name
    last = source.path.rstrip("/").split("/")[-1].split(":")[-1]
    stem = PurePath(last).stem if PurePath(last).suffix.lower() in COMPRESSED_ENDINGS else last
    return PurePath(stem).stem.strip("*?[].") or last


def named_sources(sources: Sequence[DataSource]) -> dict[str, DataSource]:
    """Sources by their name in metrics; later ones of the same name get a number."""
    named: dict[str, DataSource] = {}
    for source in sources:
        name = source_name(source)
        number = sum(other == name or other.startswith(f"{name}-") for other in named)
        named[f"{name}-{number + 1}" if number else name] = source
    return named


def validation_sets(sources: Sequence[DataSource]) -> dict[str, DataSource]:
    """Validation sources by their name in metrics, which are called `validation/NAME/loss` where there are several. One that
    would be `validation` again, as the metrics over all of them are, is `main`."""
    if len(sources) < 2:
        return named_sources(sources)
    renamed = {"name": "main"}
    return named_sources(
        [source.model_copy(update=renamed) if source_name(source) == "validation" else source for source in sources]
    )
