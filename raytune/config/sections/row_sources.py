"""Which sets of rows, which models and which code of the user's a run names, and where. Pure."""

from collections.abc import Sequence

from raytune.config.sections.data import DataSource, measured_sets
from raytune.config.sections.evaluation import code_of_suite, suites_of
from raytune.config.sections.run import RunConfig
from raytune.user_code import FILE_ENDING, parts_of


def row_sources(config: RunConfig) -> dict[str, Sequence[DataSource]]:
    """All sources by the key under which they are listed, in the order of the schema."""
    replay, ewc, suites = config.strategy.replay, config.strategy.ewc, suites_of(config.evaluation)
    quality = config.data.quality
    return {
        "data.train": config.data.train,
        "data.validation": config.data.validation,
        "data.test": config.data.test,
        "data.quality.benchmarks": quality.benchmarks if quality else [],
        "strategy.replay.data": replay.data if replay else [],
        "strategy.ewc.data": ewc.data if ewc else [],
        **{f"{key}.rows": suite.rows for key, suite in suites.items()},
        **{f"{key}.examples": suite.examples for key, suite in suites.items()},
    }


def all_sources(config: RunConfig) -> list[DataSource]:
    return [source for sources in row_sources(config).values() for source in sources]


def replayed_sources(config: RunConfig) -> list[DataSource]:
    """Sources whose rows are mixed into the training rows; share 0 asks for none."""
    replay = config.strategy.replay
    return replay.data if replay and replay.share else []


def trained_sources(config: RunConfig) -> list[DataSource]:
    """All sources whose rows are trained on: those of `data.train`, then what is replayed."""
    return [*config.data.train, *replayed_sources(config)]


def weighed_sources(config: RunConfig) -> list[DataSource]:
    """Sources whose rows the importance of weights is estimated from; strength 0 asks for none."""
    ewc = config.strategy.ewc
    return ewc.data if ewc and ewc.strength else []


def asks_in_chats(config: RunConfig) -> bool:
    """Whether rows are asked of base and tuned model, which takes a template whatever the training rows are."""
    suites = suites_of(config.evaluation).values()
    kinds_without = ("loss", "lm_eval")
    return any(suite.kind not in kinds_without or any(source.format != "text" for source in suite.rows) for suite in suites)


def tokenised_sources(config: RunConfig) -> list[DataSource]:
    """Sources whose rows become documents: all but those that are asked as questions."""
    return [*trained_sources(config), *config.data.validation, *config.data.test, *weighed_sources(config)]


def evaluated_sets(config: RunConfig) -> dict[str, DataSource | None]:
    """What is evaluated, by its name in metrics: a source, or None for the rows that are held out of the only training source."""
    return _sets(config, config.data.validation, "validation", holds_out=config.data.holds_out)


def tested_sets(config: RunConfig) -> dict[str, DataSource | None]:
    """What the model of the end is measured on, as `evaluated_sets` has it."""
    return _sets(config, config.data.test, "test", holds_out=bool(config.data.test_fraction))


def _sets(config: RunConfig, sources: Sequence[DataSource], together: str, *, holds_out: bool) -> dict[str, DataSource | None]:
    if not holds_out:
        return dict(measured_sets(sources, together))
    trained = trained_sources(config)
    return dict(measured_sets(trained, together)) if len(trained) > 1 else {together: None}


def named_models(config: RunConfig) -> dict[str, str]:
    """Paths or ids of the models that a run loads, by the key that names them: its base, a teacher that is another, and
    those that answers are compared by."""
    named, distillation = {"model.base": config.model.base}, config.strategy.distillation
    if distillation and distillation.weight > 0 and distillation.teacher != "base":
        named["strategy.distillation.teacher"] = distillation.teacher
    suites = suites_of(config.evaluation).items()
    return named | {f"{key}.bertscore.model": suite.bertscore.model for key, suite in suites if suite.bertscore}


def named_tasks(config: RunConfig) -> dict[str, str]:
    """Folders with the files of tasks, by the key that names them."""
    suites = suites_of(config.evaluation).items()
    return {f"{key}.task_folder": suite.task_folder for key, suite in suites if suite.task_folder}


def named_code(config: RunConfig) -> list[tuple[str, str]]:
    """Files with functions of the user's, each with the key that names it. Installed modules are none."""
    objective = config.strategy.objective
    named = [("strategy.objective", objective.function)] if objective else []
    named += [("data.augment.function", function)] if (function := config.data.augment.function) else []
    named += [("callbacks", name) for name in config.callbacks]
    named += [(f"{key}.metrics", name) for key, suite in suites_of(config.evaluation).items() for name in code_of_suite(suite)]
    return [(key, file) for key, file in ((key, parts_of(name)[0]) for key, name in named) if file.endswith(FILE_ENDING)]
