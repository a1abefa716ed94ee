"""Verbs of rows as functions: what becomes of all of them, and how single ones are trained."""

from os import fspath
from typing import TYPE_CHECKING, Any

from raytune.api.asked import Config, File, resolved_config
from raytune.config.asked import require_named
from raytune.config.load import as_one_run
from raytune.config.places import errors_at

if TYPE_CHECKING:
    from raytune.launch.data_check import DataCheck
    from raytune.launch.data_preview import DataPreview


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
