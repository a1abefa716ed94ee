"""Plans for machines that need not exist yet, of models and data that need not be here: with `cluster.instance`.

Nothing is started and nothing tokenised: how much data there is, is said (`plan --tokens 50M`) or taken from its files' sizes.
"""

import glob
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune.config.checks.asked import DEMO_MODEL
from raytune.config.sections.data import DataSource
from raytune.config.sections.row_sources import evaluated_sets, tested_sets, trained_sources, weighed_sources
from raytune.config.sections.run import RunConfig
from raytune.errors import PlanError, UserError
from raytune.plan.choosing.batch import DEFAULT_ROWS
from raytune.plan.choosing.choose import choose_plan
from raytune.plan.choosing.requirements import choose_row_length
from raytune.plan.choosing.setting import settle
from raytune.plan.costs.hardware import Catalogue, Instance, load_catalogue
from raytune.plan.data.built_in_rows import built_in
from raytune.plan.data.mixing import mixture_of, size_of_epoch
from raytune.plan.data.streaming import stream_plan
from raytune.plan.facts.data_facts import DataFacts
from raytune.plan.facts.machine import Machine
from raytune.plan.model.shapes import ModelShape
from raytune.plan.run_plan import RunPlan, StorePlan
from raytune.plan.strategies.distillation import planned_teacher
from raytune.plan.strategies.new_tokens import planned_base
from raytune.plan.strategies.penalty import ewc_name
from raytune.units import format_count

BYTES_PER_TOKEN = 4
"""Of text and the keys around it, in files of English rows; other languages have fewer."""
_COUNTED = "counted: they are built in, and so is the tokenizer"
_BY_BYTES = f"at {BYTES_PER_TOKEN} bytes of its rows per token"
"""Where a number of tokens that is one of rows as they are comes from."""
MAX_NODES = 16
"""Largest cluster that a comparison looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An instance type, and the plan on as few of them as hold the job; or why there is none."""

    instance: Instance
    plan: RunPlan | None
    refusal: str | None

    @property
    def usd(self) -> float | None:
        """By which candidates are ranked: spot where the config says so and a price is known."""
        cost = self.plan and self.plan.cost
        if not cost:
            return None
        return cost.spot_usd if cost.is_spot and cost.spot_usd is not None else cost.usd

    def to_json(self) -> dict[str, Any]:
        return {
            "instance": self.instance.name,
            "usd": self.usd,
            "plan": self.plan and self.plan.model_dump(mode="json"),
            "refusal": self.refusal,
        }


def plan_ahead(config: RunConfig, num_tokens: int | None = None) -> RunPlan:
    """The plan of a run on `cluster.nodes` nodes of type `cluster.instance`.

    Args:
        config: what the user wrote.
        num_tokens: training tokens of an epoch; None: by the sizes of the files.

    Raises:
        UserError: (or PlanError, ModelError) if it cannot be done as asked.
    """
    assert config.cluster.instance is not None
    catalogue = load_catalogue()
    instance = catalogue.instance(config.cluster.instance)
    shape = planned_base(config.model)
    data = assumed_data(config, choose_row_length(config, shape), num_tokens)
    return _plan(config, shape, data, instance, catalogue, config.cluster.nodes)


def compare(config: RunConfig, instances: Iterable[Instance], num_tokens: int | None = None) -> list[Candidate]:
    """The job on each of some instance types, cheapest first; those that cannot hold it last.

    Args:
        config: what the user wrote; `cluster.instance` and `cluster.nodes` do not count.
        instances: to compare.
        num_tokens: as for `plan_ahead`.

    Raises:
        UserError: if the config asks for what no machine could do.
    """
    catalogue = load_catalogue()
    shape = planned_base(config.model)
    data = assumed_data(config, choose_row_length(config, shape), num_tokens)
    candidates = [_candidate(config, shape, data, instance, catalogue) for instance in instances]
    return sorted(candidates, key=lambda one: (one.usd is None, not one.usd, one.usd or 0.0, one.instance.name))


def named_instances(names: str) -> list[Instance]:
    """`all`, a cloud (`aws`), or instance types, separated by commas.

    Raises:
        UserError: if a name is not in the catalogue.
    """
    catalogue = load_catalogue()
    every = list(catalogue.instances.values())
    wanted: dict[str, Instance] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        group = [instance for instance in every if name in ("all", instance.cloud)]
        wanted |= {instance.name: instance for instance in group or [catalogue.instance(name)]}
    return list(wanted.values())


def assumed_data(config: RunConfig, row_length: int, num_tokens: int | None) -> DataFacts:
    """Stores as they will probably be: full rows in which every token is a target.

    Raises:
        UserError: if nothing says how much data there is.
    """
    if num_tokens is not None:
        source = "as --tokens says"
    elif (counted := _demo_tokens(config)) is not None:
        num_tokens, source = counted, _COUNTED
    elif (sizes := _file_bytes(trained_sources(config))) is not None:
        if not sum(sizes):
            raise UserError(f"data.train ({', '.join(one.path for one in config.data.train)}) is empty.", keys=("data.train",))
        num_bytes = int(_as_mixed(config, sizes))
        num_tokens, source = max(1, num_bytes // BYTES_PER_TOKEN), _BY_BYTES
    elif config.training.max_steps is not None:
        num_tokens, source = config.training.max_steps * DEFAULT_ROWS * row_length, "enough for training.max_steps"
    else:
        paths = ", ".join(source.path for source in config.data.train)
        raise UserError(
            f"How many tokens data.train ({paths}) has cannot be seen from here: it is not in local files. Say it, for example "
            f"`--tokens 50M`."
        )
    if (copies := config.data.augment.copies) and source in (_COUNTED, _BY_BYTES):
        num_tokens, source = num_tokens * (1 + copies), f"{source}; {1 + copies} times as many with data.augment"
    if (stream := stream_plan(config)) and num_tokens > (most := stream.window * row_length):
        num_tokens, source = most, "a window of data.streaming, each of its rows as long as a packed one"
    names, tests = list(evaluated_sets(config)), list(tested_sets(config))
    fold = config.data.fold
    share = 1 / fold.of if fold else config.data.validation_fraction
    held_out, tested = (
        part / max(1, len(sets)) if part else 0.01 for part, sets in ((share, names), (config.data.test_fraction, tests))
    )
    ewc, ewc_words = _assumed_ewc(config, row_length)
    return DataFacts(
        train=_store("train", num_tokens, row_length),
        validation=tuple(_store(name, math.ceil(held_out * num_tokens), row_length) for name in names),
        test=tuple(_store(name, math.ceil(tested * num_tokens), row_length) for name in tests),
        ewc=ewc,
        longest_document=row_length,
        stream=stream,
        assumption=(
            f"The data is taken to be {format_count(num_tokens)} tokens ({source}), all of them targets, in full rows. "
            f"No row was read: how many are bad, cut or dropped is said by a plan without cluster.instance, and before training."
            f"{ewc_words}"
        ),
    )


def _assumed_ewc(config: RunConfig, row_length: int) -> tuple[StorePlan | None, str]:
    """What importance is estimated from, as it will probably be, and a sentence about it."""
    if not weighed_sources(config) or config.strategy.ewc is None:
        return None, ""
    count = config.strategy.ewc.max_documents
    store = _store(ewc_name(config), count * row_length, row_length)
    return store, f" strategy.ewc.data is taken to have {count} documents, as long as rows."


def _store(name: str, num_tokens: int, row_length: int) -> StorePlan:
    num_rows = math.ceil(num_tokens / row_length)
    return StorePlan(name=name, path="", num_rows=num_rows, num_tokens=num_tokens, num_targets=num_tokens)


def _demo_tokens(config: RunConfig) -> int | None:
    """Tokens of the built-in rows under the built-in model's tokenizer; None: there are others of one or the other."""
    parts = [built_in(source) for source in trained_sources(config)]
    if config.model.base != DEMO_MODEL or None in parts:
        return None
    return round(_as_mixed(config, [part.num_tokens for part in parts if part]))


def _as_mixed(config: RunConfig, sizes: Sequence[int]) -> float:
    """What an epoch has of all sources, each of which has a size."""
    names = [source.path for source in trained_sources(config)]
    return size_of_epoch(mixture_of(config), sizes, names)


def _file_bytes(sources: Iterable[DataSource]) -> list[int] | None:
    """Of each source the bytes of its local files, or of built-in rows as if they lay in one; None if one has none here."""
    sizes = []
    for source in sources:
        if part := built_in(source):
            sizes.append(part.num_bytes)
            continue
        files = [Path(name) for name in glob.glob(str(Path(source.path).expanduser())) if Path(name).is_file()]
        if not files:
            return None
        sizes.append(sum(file.stat().st_size for file in files))
    return sizes


def _candidate(config: RunConfig, shape: ModelShape, data: DataFacts, instance: Instance, catalogue: Catalogue) -> Candidate:
    refusal, numbers = None, _numbers_of_nodes(config, instance)
    for nodes in numbers:
        try:
            # What would fit on fewer nodes than the most is what the next number is tried for.
            plan = _plan(config, shape, data, instance, catalogue, nodes, advises=nodes == numbers[-1])
            if plan.cost is None:
                raise UserError(
                    "Instance types are ranked by time and money, and the catalogue knows them for 16-bit training on GPUs only. "
                    "Set training.precision to bf16 or fp16, and leave cluster.gpus_per_worker at its default."
                )
            return Candidate(instance=instance, plan=plan, refusal=None)
        except PlanError as error:
            refusal = str(error)
    return Candidate(instance=instance, plan=None, refusal=refusal)


def _numbers_of_nodes(config: RunConfig, instance: Instance) -> list[int]:
    """1, 2, 4 ...; as many as the workers need where the config says how many there are."""
    workers = config.cluster.workers
    if workers != "auto":
        return [-(-workers // instance.num_gpus)]
    return [2**power for power in range(MAX_NODES.bit_length())]


def _plan(
    config: RunConfig,
    shape: ModelShape,
    data: DataFacts,
    instance: Instance,
    catalogue: Catalogue,
    num_nodes: int,
    *,
    advises: bool = True,
) -> RunPlan:
    machine = Machine.rented(instance, catalogue.gpu_of(instance), num_nodes)
    cluster = config.cluster.model_copy(update={"instance": instance.name, "nodes": num_nodes})
    config = config.model_copy(update={"cluster": cluster})
    setting = settle(config, shape, machine, teacher=planned_teacher(config))
    return choose_plan(setting, data, model_path=config.model.base, storage=config.storage, advises=advises)
