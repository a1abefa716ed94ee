"""What became of the rows: read, used, lost and why, per source. One value, that `plan`, `train`, the run folder and the Python
result all show. Plain numbers, JSON in and out; `raytune.data` counts."""

from collections.abc import Iterable, Mapping, Sequence

from raytune.plan.value import Plan
from raytune.units import format_count

_NAMED_FILES = 4
"""Of a source of many."""


class EpochPart(Plan):
    """What an epoch has of a source: pieces that it has several times count so."""

    documents: int
    tokens: int
    targets: int


class Balance(Plan):
    """Of what kinds the good rows of a source are, before any is left out."""

    scripts: dict[str, int]
    """Script of most letters, as Unicode names it ("Latin", "Han") -> rows; empty name: rows without letters."""
    labels: dict[str, int]
    """Class -> rows, where rows have one."""
    median_words: int
    """Of last answers, or of texts."""
    most_words: int


class SourceReport(Plan):
    """The rows of one source. Counts are of rows where nothing else is said.

    Every row that was read is in exactly one of `used`, `bad`, `no_target`, `cut_off`, `dropped`, `other_side`, `test_side`,
    `origin_held_out`, `filtered`.
    """

    name: str
    """As in metrics."""
    format: str
    files: list[str] = []
    """Names of those that a folder or a glob stands for; none: it is a file itself."""
    too_long: str
    """What was done with documents that are longer than a packed row: `data.too_long`, with `auto` resolved."""
    rows: int
    """Read, or made of those."""
    augmented: int = 0
    """Made of others by `data.augment`."""
    made: int = 0
    """Of those that were read, rows that a model made of others (`raytune data reword`)."""
    used: int
    """With at least one target."""
    bad: int
    """That cannot be read or rendered (`data.on_bad_row`)."""
    no_target: int
    """No part of which carries loss (`data.targets`, `weight: 0`, `train: false`)."""
    cut_off: int
    """All of whose targets lay behind `data.max_length`; also in `cut`."""
    dropped: int
    """Longer than `data.max_length` and left out."""
    other_side: int
    """On the other side of `data.validation_fraction` or `data.fold`."""
    test_side: int = 0
    """Held out for the test, by `data.test_fraction`."""
    origin_held_out: int = 0
    """Made by a model of rows that are held out, and so neither trained nor measured."""
    filtered: int = 0
    """Left out by the policies of `data.quality`."""
    exact_duplicates: int = 0
    """That are equal to an earlier one."""
    near_duplicates: int = 0
    """That are nearly equal to an earlier one."""
    leaks: int = 0
    """That are held out too, for validation or the test, wholly, nearly, or up to their last answer."""
    benchmark_overlaps: int = 0
    """That have a passage in common with a benchmark."""
    damaged_text: int = 0
    """With characters that stand for text that was lost."""
    contradictions: int = 0
    """With the turns before the last answer of another row, but another last answer."""
    policies: dict[str, str] = {}
    """Of the last six counts, those that were looked for -> what is done with such rows."""
    balance: Balance | None = None
    """None: not looked at (`data.quality`)."""
    cut: int
    """That lost at least one token that carried loss, of whichever answer, to `data.max_length`."""
    split: int
    """That became several documents."""
    blank_answers: int
    """With a trained answer, or a text, that is empty or nothing but white space."""
    special_tokens: int = 0
    """Whose own text has a special token of the tokenizer, in letters."""
    unending: int
    """Whose last target is no special token, though nothing was cut, so that a model may not learn to stop there."""
    double_bos: int = 0
    """That begin with two beginning-of-text tokens."""
    prompt_trained: int = 0
    """Whose question is trained though `data.targets` does not ask for it: chats as plain text, answers that repeat it."""
    prompts_compared: int
    """Trained answers, of a sample, whose prompt was compared with what they are trained behind."""
    prompts_differ: int
    """Those of them that are trained behind other tokens than their prompt has (`data.on_prompt_mismatch`)."""
    documents: int
    """Pieces of split rows count singly."""
    tokens: int
    targets: int
    skipped_turns: int
    """Turns that `data.targets` means and that carry no loss because their row says so, by `weight: 0` or `train: false`."""
    weighted_turns: int = 0
    """Trained turns whose row gives each of their tokens another weight than 1 (`weight: 0.5`)."""
    systems_given: int = 0
    """That got `data.system`, in the place of their own or because they have none."""
    turns_left_out: int = 0
    """Turns before the last exchanges (`data.max_turns`)."""
    thoughts_left_out: int = 0
    """Turns that are trained, or seen, without the thought that the row has (`data.reasoning`)."""
    by_exchange: int = 0
    """That became a document for each exchange (`data.reasoning: each`)."""
    thoughts_not_shown: int = 0
    """Thoughts of turns that are not trained and that the template does not show, as those of earlier answers."""
    names_not_shown: int = 0
    """Turns with the name of who speaks (`name`), which the template does not show."""
    empty_thoughts: int = 0
    """Trained answers that begin with an empty thought (`data.train_empty_thought`)."""
    shortened: int = 0
    """That lost their earliest exchanges, or the beginning of their question, to `data.max_length`."""
    targets_of_class: dict[str, int] = {}
    """Classes of `data.token_weights`, with their factors -> targets."""
    unread_columns: dict[str, int]
    """Columns with something in them that the format does not read -> rows that have them."""
    unread_keys: dict[str, int]
    """Keys of turns that raytune does not know, which only a template that happens to read them uses, or reads otherwise than
    they are written -> rows that have them."""
    examples: dict[str, list[str]]
    """For some of these counts, by name, the first few rows with file and line."""
    lengths: list[int] = []
    """Rows that became tokens by their length, before they were cut, split or dropped: counts by bucket of `row_lengths`."""
    loss_weight: float = 1.0
    """How much each of its targets counts in the loss, times what its row says."""
    passes: float = 1.0
    """Over its documents in an epoch; what is no whole number is a part of them, another one in each epoch."""
    mixed: EpochPart | None = None
    """What an epoch has of it, in the mean, where some source has other than one pass; None: all of it once."""
    is_replayed: bool = False
    """Of `strategy.replay`."""

    @property
    def held_out(self) -> int:
        """Rows that are none of this side of a split."""
        return self.other_side + self.test_side + self.origin_held_out

    @property
    def in_epoch(self) -> EpochPart:
        """What an epoch has of it."""
        return self.mixed or EpochPart(documents=self.documents, tokens=self.tokens, targets=self.targets)


COUNTS = tuple(name for name, field in SourceReport.model_fields.items() if field.annotation is int)


class StoreReport(Plan):
    """The rows of one tokenised store."""

    row_length: int
    """Tokens that a packed row holds at most."""
    num_rows: int
    """Packed rows of an epoch."""
    sources: list[SourceReport]
    notes: list[str] = []
    """What the rows were compared with."""

    def total(self, count: str) -> int:
        """A count of `SourceReport` over all sources."""
        return sum(getattr(source, count) for source in self.sources)

    @property
    def fill(self) -> float:
        """Share of the packed rows that holds tokens."""
        return sum(source.in_epoch.tokens for source in self.sources) / max(1, self.num_rows * self.row_length)

    def named(self, names: Iterable[str]) -> "StoreReport":
        """The same with other names for its sources."""
        renamed = [source.model_copy(update={"name": name}) for source, name in zip(self.sources, names, strict=True)]
        return self.model_copy(update={"sources": renamed})


class DataReport(Plan):
    """The rows of a run."""

    template: list[str]
    """What there is to know of the chat template: ends that it does not write, markers that are no tokens."""
    train: StoreReport
    validation: dict[str, StoreReport]
    """By the name of the set in metrics."""
    test: dict[str, StoreReport] = {}
    """Of the test, by the name of the set in metrics."""
    split: list[str] = []
    """What the split came to, where more than the hash of each row decides, and files that are read for two things."""
    ewc: StoreReport | None = None
    """What the importance of weights is estimated from, a document per row; None without EWC."""

    def __str__(self) -> str:
        return "\n".join([*(f"{label}: {line}" for label, line in report_table(self)), *losses_text(self)])


def report_table(report: DataReport) -> list[tuple[str, str]]:
    """A line for each source, and for what divides them, as (label, value)."""
    of_split = [("split", line) for line in report.split]
    return of_split + [
        (f"{what} rows", line)
        for what, store in stores_of(report)
        for line in _source_lines(store, is_packed=store is not report.ewc)
    ]


def losses_text(report: DataReport) -> list[str]:
    """A line for each thing that is not as the files have it, with the first rows it is true of. Empty: all of them are used as
    they are."""
    lines = list(report.template)
    for what, store in stores_of(report):
        lines += store.notes
        for source in store.sources:
            of = source_label(what, source.name) if len(stores_of(report)) > 1 or len(store.sources) > 1 else source.name
            lines += [f"{of}: {line}" for line in _losses(source, store.row_length)]
    is_split = any(source.other_side for source in report.train.sources)
    kept = [source.name for source in report.train.sources if is_split and not source.other_side]
    return [*lines, *(f"{name}: no row of it is held out" for name in kept)]


def store_text(report: StoreReport) -> list[str]:
    """What became of the rows of one store, as lines."""
    lines = [*_source_lines(report), *report.notes]
    for source in report.sources:
        of = f"{source.name}: " if len(report.sources) > 1 else ""
        lines += [f"{of}{line}" for line in _losses(source, report.row_length)]
    return lines


def stores_of(report: DataReport) -> list[tuple[str, StoreReport]]:
    """All stores, by what their rows are read for."""
    held_out = [
        (source_label(what, name) if len(stores) > 1 else what, store)
        for what, stores in (("validation", report.validation), ("test", report.test))
        for name, store in stores.items()
    ]
    return [("training", report.train), *held_out, *([("EWC", report.ewc)] if report.ewc else [])]


def source_label(what: str, name: str) -> str:
    """A source and what its rows are read for, so that neither is taken for the other: what is validated may be test.jsonl."""
    return what if what.endswith(f" ({name})") else f"{what} ({name})"


def _source_lines(store: StoreReport, *, is_packed: bool = True) -> list[str]:
    several = len(store.sources) > 1
    lines = [f"{f'{source.name}: ' if several else ''}{_counted(source)}" for source in store.sources]
    if not is_packed:
        return lines
    packed = f"{_many(store.num_rows, 'packed row')}, {store.fill:.0%} full"
    return [*lines, packed] if several else [f"{lines[0]}; {packed}"]


def _counted(source: SourceReport) -> str:
    """All that was read and what became of it."""
    lost = [
        (source.cut, "{} cut", "answer"),
        (source.no_target + source.cut_off, "{} without targets", "row"),
        (source.bad, "{} skipped", "bad row"),
        (source.dropped, "{} dropped as too long", "row"),
        (source.split, "{} split", "document"),
        (source.blank_answers, "{} with a blank answer", "row"),
        (source.filtered, "{} left out by data.quality", "row"),
        (source.leaks, "{} held out for validation too", "row"),
        (source.other_side, "{} on the other side of the split", "row"),
        (source.test_side, "{} held out for the test", "row"),
        (source.origin_held_out, "{} made of held-out ones", "row"),
    ]
    losses = [words.format(_many(count, one)) for count, words, one in lost if count]
    made = f" and {source.augmented} made of them" if source.augmented else ""
    return (
        f"{source.rows - source.augmented} read as {source.format}{_of_files(source.files)}{made}, {source.used} used"
        + (f": {', '.join(losses)}" if losses else "")
        + f"; {format_count(source.tokens)} tokens, {format_count(source.targets)} targets"
    )


def _losses(source: SourceReport, row_length: int) -> list[str]:
    limit, of = f"data.max_length, {row_length} tokens", f"of {source.rows} rows"
    sentences = _quality_sentences(source) | {
        "bad": f"{_many(source.bad, 'bad row')} {of} skipped (data.on_bad_row: skip)",
        "no_target": f"{_many(source.no_target, 'row')} {of} without targets: nothing in them is to be trained (data.targets)",
        "cut_off": f"{_many(source.cut_off, 'row')} {of} without targets: they lie behind {limit}",
        "cut": f"{_many(source.cut, 'answer')} {'left out or ' * (source.too_long == 'truncate_left')}cut at {limit} "
        f"(data.too_long: {source.too_long})",
        "dropped": f"{_many(source.dropped, 'row')} {of} dropped, longer than {limit} (data.too_long: {source.too_long})",
        "split": f"{_many(source.split, 'document')} split at {limit} (data.too_long: {source.too_long})",
        "blank_answers": f"{_many(source.blank_answers, 'row')} with a trained answer or text that is empty or only white space",
        "special_tokens": (
            f"{_many(source.special_tokens, 'row')} {of} with a special token in the text itself: it is read as such, so that a "
            f"turn may end or begin there"
        ),
        "filtered": f"{_many(source.filtered, 'row')} {of} left out by data.quality",
        "made": f"{_many(source.made, 'row')} {of} made of others by a model: each trains only where its origin does",
        "origin_held_out": f"{_many(source.origin_held_out, 'row')} {of} made of held-out rows: neither trained nor measured",
        "double_bos": f"{_many(source.double_bos, 'row')} that begin with two beginning-of-text tokens",
        "prompt_trained": f"{_many(source.prompt_trained, 'row')} whose question is trained, though data.targets does not ask "
        f"for that",
        "shortened": f"{_many(source.shortened, 'row')} without the earliest turns, or words of the question, to fit {limit} "
        f"(data.too_long: {source.too_long})",
        "unending": f"{_many(source.unending, 'document')} whose last target is no special token: a model may not learn to stop",
    }
    lines = [sentence + _first(source.examples, name) for name, sentence in sentences.items() if getattr(source, name)]
    if source.prompts_differ:
        lines.append(
            f"{source.prompts_differ} of {source.prompts_compared} compared answers trained behind other tokens than those of "
            f"their prompt{_first(source.examples, 'prompts_differ')}"
        )
    if source.skipped_turns:
        turns = _many(source.skipped_turns, "turn")
        lines.append(f"{turns} without loss because the row says so (weight: 0, train: false)")
    if source.weighted_turns:
        lines.append(f"{_many(source.weighted_turns, 'turn')} whose tokens count by the weight that the row gives them")
    lines += [words.format(_many(getattr(source, name), one)) for name, (one, words) in _SHAPED.items() if getattr(source, name)]
    if source.targets_of_class:
        counts = (f"{name}: {count} of {source.targets} targets" for name, count in source.targets_of_class.items())
        lines.append(f"tokens that count by data.token_weights in the training loss: {'; '.join(counts)}")
    if nothing := [name.replace("_", " ") for name in source.policies if not getattr(source, name)]:
        lines.append(f"no {', no '.join(nothing)} found (data.quality)")
    lines += _balance_lines(source.balance)
    if source.unread_columns:
        lines.append(f"columns that the format {source.format} does not read: {_with_counts(source.unread_columns)}")
    if source.unread_keys:
        lines.append(f"keys of turns that raytune does not know, or reads otherwise: {_with_counts(source.unread_keys)}")
    return lines


def _quality_sentences(source: SourceReport) -> dict[str, str]:
    """By count, what was found by `data.quality`."""
    words = {
        "leaks": "that are held out for validation too, whose loss is then too low",
        "benchmark_overlaps": "with a passage of a benchmark, whose scores then say little",
        "damaged_text": "with text that was damaged where it was decoded",
        "contradictions": "with the turns of another row but another last answer",
        "exact_duplicates": "equal to an earlier one",
        "near_duplicates": "nearly equal to an earlier one",
    }
    policies = {name: f" (data.quality.{name}: {policy})" for name, policy in source.policies.items()}
    counts = {name: _many(getattr(source, name), "row") for name in words}
    return {name: f"{counts[name]} of {source.rows} rows {what}{policies.get(name, '')}" for name, what in words.items()}


def _balance_lines(balance: Balance | None) -> list[str]:
    """Of what kinds rows are."""
    if balance is None:
        return []
    of = {"script": balance.scripts, "class": balance.labels}
    shares = [f"{what}: {_shares(counts)}" for what, counts in of.items() if counts]
    words = f"words of an answer or text: {balance.median_words} in the middle, {balance.most_words} at most"
    return [f"rows by {'; by '.join([*shares, words])}"]


def _shares(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{name or 'no letters'} {count / total:.1%}" for name, count in counts.items())


_SHAPED = {
    "systems_given": ("conversation", "{} with data.system as the system prompt"),
    "turns_left_out": ("turn", "{} left out before the last exchanges (data.max_turns)"),
    "thoughts_left_out": ("turn", "{} without the thought that the row has (data.reasoning)"),
    "by_exchange": (
        "row",
        "{} trained as a document for each exchange, behind the turns before it (data.reasoning: each)",
    ),
    "thoughts_not_shown": ("thought", "{} left out by the template: not trained, and not seen by later answers"),
    "names_not_shown": ("turn", "{} without the name of who speaks (`name`), which the template does not show"),
    "empty_thoughts": (
        "answer",
        "{} beginning with an empty thought (data.train_empty_thought)",
    ),
}
"""What was done to turns, by the name of its count: what is counted, and in which words it is told."""


def _of_files(files: Sequence[str]) -> str:
    """Which files, where a source stands for them."""
    if not files:
        return ""
    names = ", ".join(files[:_NAMED_FILES])
    more = f", and {len(files) - _NAMED_FILES} more" if len(files) > _NAMED_FILES else ""
    return f" of {_many(len(files), 'file')} ({names}{more})"


def _first(examples: Mapping[str, Sequence[str]], name: str) -> str:
    return f"; the first is {examples[name][0]}" if examples.get(name) else ""


def _many(count: int, one: str) -> str:
    return f"{count} {one}{'s' * (count != 1)}"


def _with_counts(names: Mapping[str, int]) -> str:
    return ", ".join(f"'{name}' ({_many(count, 'row')})" for name, count in names.items())
