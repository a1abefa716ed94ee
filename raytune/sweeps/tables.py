"""The trials of a sweep as tables: `trials.jsonl`, `trials.csv`, and the ranked one for people. Pure."""

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from raytune.metrics.json_numbers import encode_number
from raytune.printable import plain_text
from raytune.sweeps.results import SweepResult
from raytune.sweeps.words import metric_text, value_text


def trial_records(result: SweepResult) -> list[dict[str, Any]]:
    """One flat record per trial, best first. Keys that a trial does not set are missing; only trials that may win have a rank."""
    return [
        {
            "rank": rank if trial.is_ranked else None,
            "trial": trial.trial.name,
            "state": trial.state,
            "value": None if trial.value is None else encode_number(trial.value),
            "step": trial.step,
            "num_steps": trial.num_steps,
            "rungs_reached": trial.num_rungs,
            "worker_s": round(trial.worker_s, 3),
            "cause": plain_text(trial.cause) or None,
            "folder": trial.folder,
            **{key: trial.trial.values[key] for key in result.keys if key in trial.trial.values},
        }
        for rank, trial in enumerate(result.trials, start=1)
    ]


def trials_jsonl(result: SweepResult) -> str:
    """`trials.jsonl`: a record per line."""
    return "".join(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n" for record in trial_records(result))


def trials_csv(result: SweepResult) -> str:
    """`trials.csv`: as `trials.jsonl`. An empty field is what is not there; a key that is set to nothing reads `null`."""
    columns = [*_RECORD_COLUMNS, *result.keys]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for record in trial_records(result):
        writer.writerow([_field(record, column) for column in columns])
    return text.getvalue()


_RECORD_COLUMNS = ("rank", "trial", "state", "value", "step", "num_steps", "rungs_reached", "worker_s", "cause", "folder")


def _field(record: Mapping[str, Any], column: str) -> str:
    if column not in record or (column in _RECORD_COLUMNS and record[column] is None):
        return ""
    value = record[column]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def result_table(result: SweepResult) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the ranked table, for people: rank, trial, metric, steps, what became of it, and a column per key."""
    headings = ["", "trial", result.metric, "steps", "state", *short_keys(result.keys)]
    rows = [
        [
            str(rank) if trial.is_ranked else "",
            trial.trial.name,
            metric_text(trial.value),
            f"{trial.step}/{trial.num_steps}",
            trial.state,
            *(value_text(trial.trial.values[key]) if key in trial.trial.values else "" for key in result.keys),
        ]
        for rank, trial in enumerate(result.trials, start=1)
    ]
    return headings, rows


def short_keys(keys: Sequence[str]) -> list[str]:
    """Every key by its last part where no other ends alike: `learning_rate` for `training.learning_rate`."""
    count = Counter(key.rpartition(".")[2] for key in keys)
    return [last if count[last := key.rpartition(".")[2]] == 1 else key for key in keys]
