"""What a run with streamed rows is planned by: their first window, which is tokenised here, and thrown away."""

import hashlib
import json

from raytune.data.store.request import code_fingerprint
from raytune.data.store.store import StoreInfo
from raytune.data.stream.recipe import Recipe
from raytune.data.stream.stream import Position, Window, windows_from
from raytune.plan.data.data_report import StoreReport
from raytune.plan.data.streaming import StreamPlan


def first_window(recipe: Recipe) -> StoreInfo:
    """The first window as if it were a store. It stands for all rows in what is planned, with documents as long as rows may be.

    Raises:
        DataError: if its rows cannot be used.
    """
    window = next(windows_from(recipe, Position()))
    report = StoreReport(row_length=recipe.options.max_length, num_rows=window.rows.num_rows, sources=window.reports)
    return StoreInfo(
        path=f"stream-{_fingerprint(recipe.plan, recipe, window)}",
        num_rows=window.rows.num_rows,
        rows_per_epoch=window.rows.num_rows,
        num_documents=report.total("documents"),
        num_tokens=report.total("tokens"),
        num_targets=report.total("targets"),
        num_bytes=int(window.rows.num_bytes_of_row.sum()),
        longest_document=recipe.options.max_length,
        report=report,
    )


def _fingerprint(stream: StreamPlan, recipe: Recipe, window: Window) -> str:
    """Of the rows: the tokens of the first window, and of each file its size, and its mark where that is no time at which it was
    copied; for nobody reads all of them before a run."""
    where_it_lies = {
        "sources": {"__all__": {"source": {"path", "name"}, "files": True}},
        "augment": {"function"},
        "augment_code": {"module"},
    }
    what_stops = dict.fromkeys(("on_bad_row", "on_prompt_mismatch", "limits", "read_ahead_mib"), True)
    what = stream.model_dump(mode="json", exclude={**where_it_lies, **what_stops})
    what["too_long"] = "drop" if stream.too_long == "error" else stream.too_long
    sizes = [[(file.size, file.mark if file.is_far else "") for file in source.files] for source in stream.sources]
    digest = hashlib.sha256(
        json.dumps([what, sizes, recipe.options.template, recipe.options.max_length, code_fingerprint()], sort_keys=True).encode()
    )
    for row in range(window.rows.num_rows):
        digest.update(window.rows.row(row).input_ids.tobytes())
    return digest.hexdigest()[:24]
