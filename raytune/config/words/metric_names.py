"""Names of what a run measures of its model while it trains, as they may be written in `checkpoint.metric` and `sweep.metric`.
Pure."""

from typing import Literal

from raytune.config.problems import shown
from raytune.config.sections.evaluation import LOWER_IS_BETTER, SuiteSection, is_code, suites_while_training
from raytune.config.sections.row_sources import evaluated_sets
from raytune.config.sections.run import RunConfig
from raytune.config.words.hints import hint_for_value

METRICS = ("loss", "perplexity", "bits_per_byte")
"""What is measured on all validation sets together, and on each where there are several."""


def measured(config: RunConfig) -> list[str]:
    """Names of the metrics of a run: of validation rows, if there are any, and of suites that are measured while it trains."""
    return [*_of_validation(config), *modes_of_suites(config)]


def _of_validation(config: RunConfig) -> list[str]:
    sets = evaluated_sets(config)
    if not sets:
        return []
    several = sets if len(sets) > 1 else {}
    return [f"{prefix}/{name}" for prefix in ("validation", *(f"validation/{each}" for each in several)) for name in METRICS]


def modes_of_suites(config: RunConfig) -> dict[str, Literal["min", "max"] | None]:
    """What suites measure while a run trains, and whether a smaller or a larger value is better; None: it is not known, since
    a function of the user's or the files of a task say it."""

    def mode_of(suite: SuiteSection, metric: str) -> Literal["min", "max"] | None:
        if is_code(metric) or suite.task:
            return None
        return "min" if metric in LOWER_IS_BETTER else "max"

    return {
        f"{suite.title}/{metric}": mode_of(suite, metric)
        for suite in suites_while_training(config.evaluation).values()
        for metric in suite.named_metrics
    }


def is_of_validation(metric: str) -> bool:
    return metric.startswith("validation/")


def metric_refusal(config: RunConfig, key: str, metric: str) -> str | None:
    """Why a run cannot be judged by a metric; None if it can.

    Args:
        key: under which it was written.
    """
    known = measured(config)
    if metric.startswith("test/") and metric not in known and (config.data.test or config.data.test_fraction):
        others = f": {', '.join(known)}" if known else ""
        why = "decides nothing: the test is measured once, when all is decided"
        return f"{shown(metric)} {why}; name a metric of validation{others}"
    if metric in known or not known or (is_of_validation(metric) and not _of_validation(config)):
        return None  # what is looked at where nothing gives it, says the plan
    hint = hint_for_value(key, str, metric)
    hint = hint if hint.split('"')[1:2] and hint.split('"')[1] in known else ""
    return f"{shown(metric)} is not measured here{hint or '; these are: ' + ', '.join(known)}"


def mode_refusal(config: RunConfig, metric: str, mode: str) -> str | None:
    """Why a suite's metric cannot be looked at in a mode; None if it can."""
    better = modes_of_suites(config).get(metric)
    if better is None or better == mode:
        return None
    return f"is {mode}, but of {metric} the {'lower' if better == 'min' else 'higher'} is better; set it to {better}"
