"""What is wrong with a run or a sweep, as far as it can be found without its cluster."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from raytune.config.problems import ConfigError, Place
from raytune.config.sections.run import RunConfig
from raytune.config.words.places import problem_of
from raytune.plan.costs.hardware import load_catalogue
from raytune.sweeps.space import check_space, trial_config, trials_of

if TYPE_CHECKING:
    from raytune.launch.check import Findings


def check_names(config: RunConfig, places: Mapping[str, Place]) -> None:
    """Look at names and values alone: those of a sweep's trials, and of machines.

    Raises:
        UserError: with what is wrong.
    """
    if config.sweep is not None:
        check_space(config, places)
    if config.cluster.instance:
        load_catalogue().instance(config.cluster.instance)


def check_config(config: RunConfig, places: Mapping[str, Place]) -> "Findings":
    """Look at a run, or at a sweep by its first trial.

    Args:
        places: where keys were written.

    Raises:
        ConfigError: with every problem.
    """
    from raytune.launch.check import check_run  # seconds of imports, which names and values do not need

    check_names(config, places)
    one = config if config.sweep is None else trial_config(config, trials_of(config)[0], places)
    found = check_run(one)
    if found.errors:
        raise ConfigError(sorted((problem_of(error, one, places) for error in found.errors), key=lambda each: each.place.order))
    return found
