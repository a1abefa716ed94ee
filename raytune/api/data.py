"""Verbs of rows as functions: what becomes of all of them, how single ones are trained, which to annotate, and others of them."""

from collections.abc import Mapping, Sequence
from os import fspath
from typing import TYPE_CHECKING, Any

from raytune.api.asked import Config, File, files_of, resolved_config
from raytune.config.checks.asked import require_named
from raytune.config.load import as_one_run
from raytune.config.words.places import errors_at

if TYPE_CHECKING:
    from raytune.config.sections.augment import Part
    from raytune.config.sections.training import Precision
    from raytune.launch.asking.rank import Ranking
    from raytune.launch.asking.reword import Rewording
    from raytune.launch.data.data_check import DataCheck
    from raytune.launch.data.data_preview import DataPreview


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
    from raytune.launch.data.data_check import check_data

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
    from raytune.launch.data.data_preview import preview_data

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
    from raytune.launch.asking.rank import rank
    from raytune.launch.asking.score import run_to_score
    from raytune.launch.data.rows_to_score import sources_of

    sources = sources_of(files_of(rows), row_format, max_rows, columns)
    ranked = run_to_score(fspath(run), address)
    return rank(ranked, sources, top=top, output=fspath(output), max_new_tokens=max_new_tokens, address=address)


def data_reword(
    config: Config,
    *,
    model: File,
    ask: str,
    output: File,
    parts: "Sequence[Part]" = ("user",),
    per_row: int = 1,
    limit: int | None = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    base: File | None = None,
    template: str = "auto",
    dtype: "Precision | None" = None,
    workers: int | None = None,
    address: str | None = None,
    trust_remote_code: bool = False,
    **overrides: Any,
) -> "Rewording":
    """Have a model put the training rows of a run into other words, as `raytune data reword` does.

    Args:
        config, overrides: as for `train`. What its split, fold, test or files of validation hold out is not asked about.
        model, base, template, dtype, trust_remote_code: who is asked, as for `generate`.
        ask: what it is asked, with `{content}` where a text of the row goes.
        output: file for the new rows, to be listed in `data.train`; it must not be there yet. The same call goes on with one that
            was interrupted.
        parts: turns that get other words: of "system", "user", "assistant"; or ("text",) for plain documents.
        per_row: versions of each row; several need a temperature.
        limit: rows at most, drawn by `seed`.
        system: message for the model that is asked.
        max_new_tokens, temperature, top_p, top_k, seed, batch_size: as for `generate`.
        workers, address: as for `generate`, instead of those of the config.

    Returns:
        How many rows were read (`num_rows`), `not_asked` by reason, and of `num_versions` asked for how many were kept
        (`num_kept`) and `dropped` by reason.

    Raises:
        raytune.errors.UserError: before anything is started, if there is no such model, or no row to reword.
        raytune.errors.RaytuneError: if the workers failed; what was answered is kept.
    """
    from raytune.evaluation.sampling import sampling_plan
    from raytune.launch.asking.generate import HowToAnswer
    from raytune.launch.asking.models_to_ask import Named, models_to_ask
    from raytune.launch.asking.reword import HowToReword, prepare_rewording, reword

    sampling = sampling_plan(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    answering = HowToAnswer(max_new_tokens=max_new_tokens, sampling=sampling, batch_size=batch_size, system=system)
    how = HowToReword(ask=ask, parts=tuple(parts), per_row=per_row, limit=limit, seed=seed, answering=answering)
    named = Named(
        model=fspath(model),
        base=None if base is None else fspath(base),
        template=template,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    to_ask = models_to_ask(named)
    resolved, places = resolved_config(config, overrides)
    with errors_at(resolved, places):
        run = require_named(as_one_run(resolved), places=places)
        prepared = prepare_rewording(run, to_ask, how, address=address, workers=workers)
    return reword(prepared, fspath(output))
