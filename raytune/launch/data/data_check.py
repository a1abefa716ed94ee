"""What becomes of all rows of a run, and what `data.limits` says of them, without a plan and without training.

The stores that it makes are the run's own: `train` finds them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from raytune.config.sections.data import DataSource
from raytune.config.sections.run import RunConfig
from raytune.data.store.build import ParallelMap
from raytune.launch.data.prepare import Base
from raytune.launch.data.stores import DataBuilder
from raytune.plan.choosing.requirements import choose_row_length
from raytune.plan.data.data_limits import Verdict, verdicts, without_limits
from raytune.plan.data.data_report import DataReport, StoreReport, losses_text, report_table, source_label, stores_of
from raytune.plan.data.row_lengths import added, length_lines, length_of_share
from raytune.plan.data.streaming import check_streaming
from raytune.storage import absolute
from raytune.units import format_count

DONE_HERE = 8
"""Tasks of two MiB at least that are tokenised in this process: a cluster takes longer to start."""

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCheck:
    """All that is known of the rows of a run before it is planned."""

    report: DataReport
    verdicts: list[Verdict]
    max_rows: int | None
    """Rows of each source that were looked at, at most; None: all."""
    window: int | None
    """Rows of the source that is streamed that were looked at, at most; None: none is, or no more of it than of others."""

    @property
    def is_refused(self) -> bool:
        """Whether a run on these rows would be stopped."""
        return any(verdict.is_exceeded for verdict in self.verdicts)

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": not self.is_refused,
            "max_rows": self.max_rows,
            "window": self.window,
            "report": self.report.model_dump(mode="json"),
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
        }

    def __str__(self) -> str:
        lines = [f"{label:18} {line}" for label, line in report_table(self.report)]
        lines += [f"  {line}" for line in losses_text(self.report)]
        for use, store in stores_of(self.report):
            lines += ["", *_tokens_lines(use, store), "", *_lengths_lines(use, store)]
        lines += ["", "Limits (data.limits and the policies beside it):"]
        several = len({(verdict.use, verdict.source) for verdict in self.verdicts}) > 1
        for number, verdict in enumerate(self.verdicts):
            before = self.verdicts[number - 1]
            if several and (number == 0 or (verdict.use, verdict.source) != (before.use, before.source)):
                lines.append(f"  {source_label(verdict.use, verdict.source)}")
            lines.append(f"  {verdict.line}")
        exceeded = [verdict for verdict in self.verdicts if verdict.is_exceeded]
        lines += [line for verdict in exceeded for line in ("", verdict.text)]
        looked = "all rows" if self.max_rows is None else f"the first {self.max_rows} rows of each source"
        if self.window is not None:
            looked = f"all rows, but at the first {self.window} only of those that are streamed (--rows looks at more)"
        judged = f"{len(exceeded)} limits are exceeded" if len(exceeded) > 1 else "1 limit is exceeded"
        end = f"{judged}: a run would stop before any worker starts" if exceeded else "a run may train on them"
        return "\n".join([*lines, "", f"Looked at {looked}; {end}."])


def check_data(config: RunConfig, max_rows: int | None = None) -> DataCheck:
    """Tokenise the rows of a run, or find them tokenised, and judge them.

    Args:
        max_rows: of each source, at most; None: all of them, and of one that is streamed the window that a run is planned by. The
            stores of fewer are thrown away.

    Raises:
        UserError: if there is no such model, or no row can be trained on.
    """
    window = config.data.streaming.window if config.data.streaming and max_rows is None else None
    if window is not None:
        check_streaming(config)
    base = Base.of(config.model)
    config = config.model_copy(update={"model": base.section})
    data = config.data
    lenient = config.model_copy(update={"data": without_limits(data)})
    with TemporaryDirectory() as scratch, _mapping(config) as parallel_map:
        if max_rows is not None:
            lenient = _first_rows(lenient, max_rows, scratch)
        report = data_builder(lenient, base, parallel_map).build().report
    assert report is not None
    return DataCheck(report=report, verdicts=verdicts(report, data), max_rows=max_rows, window=window)


def data_builder(config: RunConfig, base: Base, parallel_map: ParallelMap) -> DataBuilder:
    """As a run has it, before it is planned."""
    row_length = choose_row_length(config, base.shape)
    storage = absolute(config.storage)
    return DataBuilder(config, base.path, row_length, storage, parallel_map, num_embeddings=base.shape.vocab)


@contextmanager
def _mapping(config: RunConfig) -> Iterator[ParallelMap]:
    """What does tasks here where there are few, and else on the cluster, which is joined then."""
    with ExitStack() as stack:
        joined = False

        def parallel_map(function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterable[Result]:
            nonlocal joined
            if len(tasks) <= DONE_HERE:
                return map(function, tasks)
            from raytune.launch.cluster.cluster import connect, map_on_cluster  # loads Ray, which few rows do without

            if not joined:
                stack.enter_context(connect(config.cluster))
                joined = True
            return map_on_cluster(function, tasks, start_timeout=config.cluster.start_timeout)

        yield parallel_map


def _first_rows(config: RunConfig, max_rows: int, store: str) -> RunConfig:
    """The same run on the first rows of each source."""

    def few(sources: Sequence[DataSource]) -> list[DataSource]:
        return [source.model_copy(update={"max_rows": min(max_rows, source.max_rows or max_rows)}) for source in sources]

    replay, ewc, data = config.strategy.replay, config.strategy.ewc, config.data
    strategy = {
        "replay": replay and replay.model_copy(update={"data": few(replay.data)}),
        "ewc": ewc and ewc.model_copy(update={"data": few(ewc.data)}),
    }
    held_out = {"validation": few(data.validation), "test": few(data.test)}
    rows = {"train": few(data.train), **held_out, "store": store, "streaming": None}
    return config.model_copy(
        update={"data": data.model_copy(update=rows), "strategy": config.strategy.model_copy(update=strategy)}
    )


def _tokens_lines(use: str, store: StoreReport) -> list[str]:
    """What packed rows have of each source."""
    parts = [(source.name, source.in_epoch) for source in store.sources]
    tokens, targets = sum(part.tokens for _, part in parts), sum(part.targets for _, part in parts)
    width = max(len("source"), *(len(name) for name, _ in parts))
    lines = [
        f"In {store.num_rows} packed rows of {store.row_length} tokens, {store.fill:.1%} full, of {use}:",
        f"  {'source':{width}} {'documents':>10} {'tokens':>9} {'share':>7} {'targets':>9} {'share':>7}",
    ]
    return lines + [
        f"  {name:{width}} {part.documents:>10} {format_count(part.tokens):>9} {part.tokens / max(1, tokens):>7.1%} "
        f"{format_count(part.targets):>9} {part.targets / max(1, targets):>7.1%}"
        for name, part in parts
    ]


def _lengths_lines(use: str, store: StoreReport) -> list[str]:
    """How long rows are, source by source."""
    lines = [f"Tokens of a row of {use}, before data.max_length:"]
    for source in store.sources:
        half, most = (length_of_share(source.lengths, share) for share in (0.5, 0.95))
        lines.append(f"  {source.name}: half of them have at most {half}, 95 % at most {most}")
        lines += [f"    {line}" for line in length_lines(source.lengths)]
    if len(store.sources) > 1:
        most = length_of_share(added(source.lengths for source in store.sources), 0.95)
        lines.append(f"  all sources: 95 % have at most {most}")
    return lines
