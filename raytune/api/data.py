"""Verbs of rows as functions: what becomes of all of them, and how single ones are trained."""

from collections.abc import Mapping, Sequence
from os import fspath
from typing import TYPE_CHECKING, Any

from raytune.api.asked import Config, File, files_of, resolved_config
from raytune.config.asked import require_named
from raytune.config.load import as_one_run
from raytune.config.places import errors_at

if TYPE_CHECKING:
    from raytune.launch.data_check import DataCheck
    from raytune.launch.data_preview import DataPreview
    from raytune.launch.rank import Ranking


def data_check(config: Config, *, max_rows: int | None = None, **overrides: Any) -> "DataCheck":
    """Report on the rows of a run as `raytune data check` does. Trains nothing; what is tokenised stays where `train` finds it.

    Args:
        config, overrides: as for `train`.
        max_rows: of each source, at most; then nothing stays.

    Returns:
        `report` (the counts of a run's `data_report`), `verdicts` of `data.limits` with count, share, limit and the first rows,
        and `is_refused`: whether a run would be stopped by them. `str()` puts it into words.

    Raises:
        raytune.errors.UserError: if there is no such model, or no row can be trained on.
    """
    from raytune.launch.data_check import check_data

    resolved, places = resolved_config(config, overrides)
    with errors_at(resolved, places):
        return check_data(require_named(as_one_run(resolved), places=places), max_rows)


def data_preview(
    config: Config,
    *,
    rows: int = 3,
    source: str | None = None,
    row: str | None = None,
    page: File | None = None,
    **overrides: Any,
) -> "DataPreview":
    """Rows as they are trained, as `raytune data preview` shows them. Trains nothing.

    Args:
        config, overrides: as for `train`.
        rows: the first ones of each source.
        source: name of the only source that is meant, also of one that is held out.
        row: `FILE:LINE` of the only row that is meant.
        page: file for a page.

    Returns:
        `documents`, each with its tokens (`input_ids`), what each of them is (`kinds`: target, weight, turn, special) and the
        same as `pieces` of text; `lost`, rows without a document. `str()` shows them with what is trained in brackets.

    Raises:
        raytune.errors.UserError: if there is no such source or row.
    """
    from raytune.launch.data_preview import preview_data

    resolved, places = resolved_config(config, overrides)
    with errors_at(resolved, places):
        shown = preview_data(require_named(as_one_run(resolved), places=places), rows=rows, source=source, row=row)
    if page is not None:
        from raytune.report.preview_page import write_preview_page

        write_preview_page(fspath(page), resolved.name, shown)
    return shown


def data_rank(
    run: File,
    rows: File | Sequence[File],
    *,
    output: File,
    top: int = 100,
    row_format: str = "auto",
    columns: Mapping[str, str] | None = None,
    max_rows: int | None = None,
    max_new_tokens: int = 256,
    address: str | None = None,
) -> "Ranking":
    """Rank rows without answers by how unsure a run's model is of them, as `raytune data rank` does.

    Args:
        run: a finished run's folder.
        rows: files, globs, folders or data sets, as in `data.train`, with answers or without.
        output: file for the least certain, a line of JSON each; it must not be there yet.
        top: rows that are written.
        row_format, columns, max_rows: as in `data.train`.
        max_new_tokens: longest answer, in tokens.
        address: of a Ray cluster, as `cluster.address`, instead of the run's; "here": one inside this machine.

    Returns:
        `rows`, each with its `uncertainty` (nats per token of the model's own answer) and what was `asked`; how many were ranked
        (`num_ranked`), and the `mean` over them.

    Raises:
        raytune.errors.UserError: before anything is started, if the run has no final model, or no row can be asked.
        raytune.errors.RaytuneError: if the workers failed.
    """
    from raytune.launch.rank import rank
    from raytune.launch.rows_to_score import sources_of
    from raytune.launch.score import run_to_score

    sources = sources_of(files_of(rows), row_format, max_rows, columns)
    ranked = run_to_score(fspath(run), address)
    return rank(ranked, sources, top=top, output=fspath(output), max_new_tokens=max_new_tokens, address=address)
