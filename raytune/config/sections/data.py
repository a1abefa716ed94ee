"""`data`: the rows, how they become conversations, tokens, targets and packed rows."""

import re
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import count
from math import isfinite
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from raytune.config.sections.augment import AugmentSection
from raytune.config.sections.data_limits import LimitsSection
from raytune.config.sections.quality import QualityPolicies
from raytune.config.sections.section import Auto, Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section, Text
from raytune.config.sections.split import FoldSection, SplitSection

DataFormat = Literal[
    "messages", "sharegpt", "alpaca", "question_answer", "classification", "summarisation", "prompt_completion", "text"
]
FILE_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".feather")
"""Of files with rows; what has none of them is a folder, or a data set of a hub."""
FileKind = Literal["json", "csv", "tsv", "txt", "parquet", "arrow", "dataset", "demo"]
"""How a file is read, a data set of a hub or of `save_to_disk`, or built-in rows."""
COMPRESSED_ENDINGS = (".gz", ".bz2", ".xz", ".zst")
"""Behind the ending of a file of text."""
MOST_PASSES = 1000
"""Of an epoch over one source. More of them are a mistake, and would fill a disk."""
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
    passes: Annotated[float, Field(gt=0, le=MOST_PASSES, examples=[2.0])] | None = None
    """How often an epoch passes over it, in place of a `proportion`; of other sources once, where they say nothing. 2: each row
    twice; 0.1: a tenth of its rows, in each epoch others, so that ten epochs have seen all."""
    max_passes: Annotated[float, Field(ge=1, le=MOST_PASSES, examples=[4.0])] | None = None
    """How often an epoch passes over it at most, whatever its `proportion` or the `mixing.temperature` asks for, so that a small
    source is not learned by heart. Its part is smaller then, those of the others stay as they are against each other."""


class MixingSection(Section):
    """How much an epoch has of each of several training sources, where that is not each row once."""

    temperature: Annotated[float, Field(ge=0.01, examples=[2.0])] | None = None
    """Instead of a `proportion` per source: a source of n targets gets a part of n^(1 / temperature). 1: as many as it has; the
    higher, the more alike the parts are."""
    until: Literal["all_exhausted", "first_exhausted"] = "all_exhausted"
    """When an epoch ends: with `all_exhausted` when each row of each source was seen, those of others more than once; with
    `first_exhausted` when those of one source were, so that no row is seen twice; of the others each epoch has a part, and the
    next one another."""


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
    if not without and (twice := [source.path for source in sources if source.passes is not None]):
        raise ValueError(f"give {twice[0]} a proportion or passes: both say how much an epoch has of it")
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
    read_ahead_mib: NonNegativeInt = 64
    """MiB of files behind URLs (s3:// gs:// abfs://, a hub) that each worker fetches ahead of what it tokenises, and holds in
    memory, so that nobody waits for a slow store. 0: none."""


class QualitySection(QualityPolicies):
    benchmarks: Sources = []
    """Rows of benchmarks that no training row should have a passage of: a path, a source, or a list of them. Answers may be
    missing; rows of several choices name their question with `columns: {text: question}`."""

    @model_validator(mode="after")
    def _reads_its_benchmarks(self) -> "QualitySection":
        if self.benchmarks and self.benchmark_overlaps == "ignore":
            raise ValueError("benchmark_overlaps is ignore, so that nothing reads the benchmarks; leave one of the two out")
        return self


def _variables(options: dict[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        if not name.isidentifier():
            raise ValueError(f"{name!r} is no name of a variable: letters, digits and _")
        if unfit := next((one for one in _within(value) if not isinstance(one, str | bool | int | float | None)), None):
            raise ValueError(
                f"{name} holds {unfit!r}; expected text, a number, true, false, null, or lists and mappings of these"
            )
        if any(isinstance(one, float) and not isfinite(one) for one in _within(value)):
            raise ValueError(f"{name} is a number that is not finite")
    return options


def _says_something(text: str | None) -> str | None:
    if text is not None and not text.strip():
        raise ValueError(f"must have words, got {text!r}; leave it out where chats are to have no system prompt")
    return text


def _a_date(text: str) -> str:
    is_written = text == "auto" or re.fullmatch(r"\d{4}-\d\d-\d\d", text)  # `fromisoformat` reads other forms too
    try:
        if is_written and text != "auto":
            date.fromisoformat(text)
    except ValueError:
        is_written = False
    if not is_written:
        raise ValueError("must be a date that there is, as in 2026-11-30, or auto")
    return text


def _within(value: Any) -> Iterator[Any]:
    """All that lists and mappings hold, keys too."""
    if isinstance(value, list):
        for inner in value:
            yield from _within(inner)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *_within(inner))
    else:
        yield value


class DataSection(Section):
    train: TrainSources = [TrainSource(path="demo:train")]
    """Training rows: one source or a list. A plain string is a path. A run has to name them, unless `model.base` is `demo`."""
    mixing: MixingSection = MixingSection()
    """How often an epoch has the rows of each of several sources. Without a word here or in them: each row once."""
    augment: AugmentSection = AugmentSection()
    """Further training rows that are made of those that there are."""
    validation: Sources = []
    """Rows for evaluation while training. Empty with `validation_fraction` 0: no evaluation."""
    validation_fraction: Fraction = 0.0
    """Share of the training rows that is held out for validation, chosen by a stable hash of the row's content. Those of several
    sources are measured as sets of their own too (`validation/NAME/loss`)."""
    fold: FoldSection | None = None
    """Hold out one of several equal parts of the training rows for validation, instead of a share of them: cross-validation.
    `raytune train --folds 5` trains one run per part, and says what they come to together."""
    test: Sources = []
    """Rows that are kept from every decision: the model that a run leaves is measured on them once, at its end (`test/loss`). No
    rule stops by them, no checkpoint and no trial is chosen by them."""
    test_fraction: Fraction = 0.0
    """Share of the training rows that is held out as such a test instead. It does not depend on `validation_fraction` or `fold`,
    unless rows are split by time: all folds have the same test."""
    split: SplitSection = SplitSection()
    """What decides which rows are held out: their content, unless a column is named."""
    template: Text = "auto"
    """Chat template: `auto` (the tokenizer's own), a shipped one (`chatml`, `llama-2`, `llama-3`, `llama-3.1`, `mistral`,
    `mistral-nemo`, `gemma`, `qwen`, `qwen-3`, `glm-4.5`, `gpt-oss`, `deepseek`, `deepseek-r1`, `phi-4`, `granite`, `alpaca`,
    `plain`), or the path of a Jinja file."""
    template_options: Annotated[
        dict[str, Any], AfterValidator(_variables), Field(examples=[{"enable_thinking": False}, {"reasoning_effort": "low"}])
    ] = {}
    """Variables of the chat template and their values, for example `{enable_thinking: false}`; one that it does not read is
    refused with those that it reads. They are saved with the model, in its template, so that it is asked as it was trained: by
    raytune and by whoever reads that template. A caller who passes a variable of his own has his way."""
    template_date: Annotated[Text, AfterValidator(_a_date), Field(examples=["2026-11-30"])] = "auto"
    """Date that a chat template writes which asks for today's, as in `2026-11-30`: rows, and whoever reads the template from a
    saved model, have this one whatever the day. `auto`: 2024-07-26, or the date that the template was saved with."""
    system: Annotated[Text | None, AfterValidator(_says_something), Field(examples=["Answer in one sentence."])] = None
    """System prompt of conversations: of those that have none, or of all (`system_when`). It is saved with the model, in its
    template, as that of chats that have none."""
    system_when: Literal["missing", "always"] = "missing"
    """Which conversations get `data.system`: those without a system turn (`missing`), or all, in the place of their own
    (`always`). How many there were is said."""
    targets: Literal["completion", "assistant", "last", "all"] | list[Role] = "assistant"
    """Which tokens carry loss: `completion` and `assistant` (every assistant turn), `last` (the last assistant turn), `all` (the
    prompt too), or a list of roles. End-of-turn tokens of these turns are trained; padding never is, nor a turn whose row says
    `weight: 0` or `train: false`. Another `weight` of a turn (`0.5`, `3`) is how much each of its tokens counts in the loss."""
    token_weights: TokenWeightsSection = TokenWeightsSection()
    """Let tokens of some classes of text (digits, syntax of code, what patterns find) count more or less than others in the
    training loss; held-out rows are measured without, so that their loss stays comparable. The plan says how many there are."""
    quality: QualitySection | None = None
    """Look for duplicates, leaks of held-out rows, passages of benchmarks and contradictory answers among the training rows. The
    rows are read once more for that."""
    max_turns: PositiveInt | None = None
    """Keep the last exchanges of a conversation only, a question with all that answers it each; the system prompt stays. What is
    left out is not trained, and counted."""
    reasoning: Literal["keep", "last", "each", "none"] = "keep"
    """Which thoughts of the rows are trained (`reasoning_content`, `<think>` in an answer): all (`keep`; a trained one that the
    template leaves out is refused), those behind the last question (`last`; earlier answers are trained in words alone), or none.
    `each`: all, of conversations with earlier thoughts one exchange at a time, behind the turns before it as the template shows
    them then, which may be without their thoughts (Qwen3, DeepSeek); such a row becomes a document for each exchange."""
    train_empty_thought: bool = True
    """Whether an empty thought in front of an answer (`<think></think>`) carries loss where the template's prompt does not write
    it. `false`: only what follows it does."""
    max_length: PositiveInt | Auto = "auto"
    """Tokens per packed row, and the longest document. `auto`: 2048, or the model's limit where that is smaller."""
    too_long: Literal["truncate", "truncate_left", "drop", "split", "split_turns", "error"] | Auto = "auto"
    """What happens to a longer document. `truncate` cuts the end and says how many rows lost trained tokens. `truncate_left`
    leaves out a chat's earliest exchanges, then the beginning of its last question, and never a part of an answer or the system
    prompt; a chat whose last answer does not fit is dropped; plain text keeps its last tokens. `split` cuts into pieces of equal
    length, `split_turns` a chat between exchanges, each piece with the system prompt. `auto`: `split` for plain text, `truncate`
    for chats."""
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
    """Train on rows without a store: of files that every node mounts, behind URLs or of a hub, in order, shuffled by window;
    several sources by their `proportion`."""
    limits: LimitsSection = LimitsSection()
    """How many rows may be lost, or be trained otherwise than they should, before a run is stopped for it."""
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
        if self.test and self.test_fraction:
            raise ValueError("give data.test or data.test_fraction, not both")
        if self.validation_fraction + self.test_fraction >= 1:
            shares = f"{self.validation_fraction:g} and {self.test_fraction:g}"
            raise ValueError(f"data.validation_fraction and data.test_fraction must leave rows to train on, got {shares}")
        if self.fold and (self.validation or self.validation_fraction):
            given = "data.validation" if self.validation else "data.validation_fraction"
            raise ValueError(f"data.fold says which rows are held out, and so does {given}: leave one out")
        if self.fold and self.split.time is not None:
            raise ValueError(
                "folds are not of times: a run of one would be trained on rows that are later than those that it is measured on. "
                "Leave out data.fold and give data.validation_fraction, or leave out data.split.time"
            )
        if self.reasoning == "each" and self.targets == "all":
            raise ValueError(
                "data.reasoning: each trains each turn once, data.targets: all the whole text; name roles as targets"
            )
        return self

    @property
    def holds_out(self) -> bool:
        """Whether validation rows are held out of those of training."""
        return bool(self.validation_fraction or self.fold)


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
        own = source_name(source)
        others = (f"{own}-{number}" for number in count(2))
        named[own if own not in named else next(other for other in others if other not in named)] = source
    return named


def measured_sets(sources: Sequence[DataSource], together: str = "validation") -> dict[str, DataSource]:
    """Held-out sources by their name in metrics, which are called `validation/NAME/loss` where there are several. One that would
    be `validation` again, as the metrics over all of them are, is `main`.

    Args:
        together: what the metrics over all of them are called.
    """
    if len(sources) < 2:
        return named_sources(sources)
    renamed = {"name": "main"}
    return named_sources([source.model_copy(update=renamed) if source_name(source) == together else source for source in sources])
