"""Names of what a run measures on its validation rows, as they may be written in `checkpoint.metric` and `sweep.metric`. Pure."""

from raytune.config.hints import hint_for_value
from raytune.config.problems import shown
from raytune.config.row_sources import evaluated_sets
from raytune.config.run import RunConfig

METRICS = ("loss", "perplexity", "bits_per_byte")
"""What is measured on all validation sets together, and on each where there are several."""


def measured(config: RunConfig) -> list[str]:
    """Names of the metrics of a run; none without validation rows."""
    sets = evaluated_sets(config)
    if not sets:
        return []
    several = sets if len(sets) > 1 else {}
    return [f"{prefix}/{name}" for prefix in ("validation", *(f"validation/{each}" for each in several)) for name in METRICS]


def metric_refusal(config: RunConfig, key: str, metric: str) -> str | None:
    """Why a run cannot be judged by a metric; None if it can.

    Args:
        key: under which it was written.
    """
    known = measured(config)
    if metric in known or not known:
        return None
    hint = hint_for_value(key, str, metric)
    hint = hint if hint.split('"')[1:2] and hint.split('"')[1] in known else ""
    return f"{shown(metric)} is not measured here{hint or '; these are: ' + ', '.join(known)}"
