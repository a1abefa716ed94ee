"""Which rows a config names, and under which key: one list for whoever looks for files, without asking what they are for."""

from collections.abc import Sequence

from raytune.config.data import DataSource
from raytune.config.run import RunConfig


def rows_by_key(config: RunConfig) -> dict[str, Sequence[DataSource]]:
    """Sources by the dotted key that lists them; empty lists where none are named."""
    generation, ewc = config.evaluation.generation, config.strategy.ewc
    return {
        "data.train": config.data.train,
        "data.validation": config.data.validation,
        "strategy.ewc.data": ewc.data if ewc else [],
        "evaluation.generation.rows": generation.rows if generation else [],
    }


def tokenised_sources(config: RunConfig) -> list[DataSource]:
    """Sources whose rows become documents: all but those that are asked as questions."""
    return [source for key, rows in rows_by_key(config).items() if key != "evaluation.generation.rows" for source in rows]
