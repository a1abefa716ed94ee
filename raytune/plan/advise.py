"""Which method? The plan of each for one model, one amount of data and the same machines, side by side. Pure."""

from dataclasses import dataclass
from typing import Any

from raytune.config.load import config_with
from raytune.config.reading.presets import RANKED
from raytune.config.sections.adapter import LoraAdapter
from raytune.config.sections.run import RunConfig
from raytune.errors import UserError
from raytune.plan.ahead import assumed_data
from raytune.plan.choosing.choose import choose_plan
from raytune.plan.choosing.requirements import choose_row_length
from raytune.plan.choosing.setting import settle
from raytune.plan.costs.hardware import load_catalogue
from raytune.plan.facts.machine import Machine
from raytune.plan.methods import METHODS
from raytune.plan.run_plan import RunPlan
from raytune.plan.strategies.distillation import planned_teacher
from raytune.plan.strategies.new_tokens import planned_base


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A method, with its plan for a job; or why there is none."""

    method: str
    when: str
    """What it is good for."""
    plan: RunPlan | None
    refusal: str | None

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "when": self.when,
            "plan": self.plan and self.plan.model_dump(mode="json"),
            "refusal": self.refusal,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Advised:
    methods: tuple[Advice, ...]
    """First those that can be done, then the others, each in the order of the table of methods."""
    assumption: str
    """How much data was taken to be there, and why."""

    def to_json(self) -> dict[str, Any]:
        return {"assumption": self.assumption, "methods": [one.to_json() for one in self.methods]}


def advise(config: RunConfig, here: Machine, num_tokens: int | None = None) -> Advised:
    """Every method on a job.

    Args:
        config: what the user wrote; its `adapter` section is for its method and presets of that (`lora`, `qlora`), of which the
            others keep `modules_to_save` and have defaults else, since ranks and names of layers mean something else there.
            `strategy.unfreeze` is for the method that it is written with.
        here: this machine, which counts where the config names no `cluster.instance`.
        num_tokens: training tokens of an epoch; None: by the sizes of the files.

    Raises:
        UserError: (or ModelError) if the model or the amount of data is not known.
    """
    catalogue = load_catalogue()
    machine = here
    if config.cluster.instance:
        instance = catalogue.instance(config.cluster.instance)
        machine = Machine.rented(instance, catalogue.gpu_of(instance), config.cluster.nodes)
    shape = planned_base(config.model)
    data = assumed_data(config, choose_row_length(config, shape), num_tokens)
    advice = []
    for name, method in METHODS.items():
        plan = refusal = None
        try:
            with_method = _with_method(config, name)
            setting = settle(with_method, shape, machine, teacher=planned_teacher(with_method))
            plan = choose_plan(setting, data, model_path=config.model.base, storage=config.storage)
        except UserError as error:
            refusal = str(error)
        advice.append(Advice(method=name, when=method.when, plan=plan, refusal=refusal))
    return Advised(methods=tuple(sorted(advice, key=lambda one: one.plan is None)), assumption=data.assumption)


def _with_method(config: RunConfig, method: str) -> RunConfig:
    """The config with another method."""
    if method == config.adapter.method:
        return config
    if config.strategy.unfreeze:  # the way of what is trained whole
        config = config.model_copy(update={"strategy": config.strategy.model_copy(update={"unfreeze": []})})
    if config.adapter.method not in RANKED or method not in RANKED:
        saved = getattr(config.adapter, "modules_to_save", []) if method != "full" else []
        config = config.model_copy(update={"adapter": LoraAdapter(modules_to_save=saved) if saved else LoraAdapter()})
    return config_with(config, {"adapter": {"method": method}})
