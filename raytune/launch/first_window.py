"""What a run with streamed rows is planned by: their first window, which is tokenised here, and thrown away."""

import hashlib
import json
import os

from raytune.data.store import StoreInfo
from raytune.data.store_request import code_fingerprint
from raytune.data.stream import Position, Recipe, Window, reading_of_stream, report_of, windows_from
from raytune.plan.data_report import StoreReport
from raytune.plan.streaming import StreamPlan


def first_window(stream: StreamPlan, recipe: Recipe) -> StoreInfo:
    """The first window as if it were a store. It stands for all rows in what is planned, with documents as long as rows may be.

    Raises:
        DataError: if its rows cannot be used.
    """
    window = next(windows_from(recipe, Position()))
    report = report_of(recipe, reading_of_stream(recipe), window.tally)
    return StoreInfo(
        path=f"stream-{_fingerprint(stream, recipe, window)}",
        num_rows=window.rows.num_rows,
        rows_per_epoch=window.rows.num_rows,
        num_documents=report.documents,
        num_tokens=report.tokens,
        num_targets=report.targets,
        num_bytes=int(window.rows.num_bytes_of_row.sum()),
        longest_document=recipe.options.max_length,
        report=StoreReport(row_length=recipe.options.max_length, num_rows=window.rows.num_rows, sources=[report]),
    )


def _fingerprint(stream: StreamPlan, recipe: Recipe, window: Window) -> str:
    """Of the rows: the tokens of the first window, and the size of each file, for nobody reads all of them before a run."""
    where_it_lies = {"source": {"path", "name"}, "augment": {"function"}, "augment_code": {"module"}}
    what_stops = dict.fromkeys(("on_bad_row", "on_prompt_mismatch", "limits"), True)
    what = stream.model_dump(mode="json", exclude={**where_it_lies, **what_stops})
    what["too_long"] = "drop" if stream.too_long == "error" else stream.too_long
    sizes = [os.path.getsize(file.path) if os.path.isfile(file.path) else 0 for file in recipe.files]
    digest = hashlib.sha256(
        json.dumps([what, sizes, recipe.options.template, recipe.options.max_length, code_fingerprint()], sort_keys=True).encode()
    )
    for row in range(window.rows.num_rows):
        digest.update(window.rows.row(row).input_ids.tobytes())
    return digest.hexdigest()[:24]
