"""A plan in words, as it is shown before a run starts. Pure: strings out."""

from collections.abc import Sequence

from raytune.plan.advise import Advice, Advised
from raytune.plan.ahead import Candidate
from raytune.plan.calendar import in_steps
from raytune.plan.choosing.suites import suite_in_words
from raytune.plan.choosing.while_training import while_training_in_words
from raytune.plan.costs.memory import bytes_in, fullest_moment, parts_at
from raytune.plan.data.data_report import losses_text, report_table
from raytune.plan.data.mixing import mixture_in_words
from raytune.plan.data.streaming import stream_in_words
from raytune.plan.methods import method_of
from raytune.plan.model.rope import rope_in_words
from raytune.plan.run_plan import MemoryPart, Moment, Place, RunPlan
from raytune.plan.strategies.averaging import averaging_in_words
from raytune.plan.strategies.distillation import distillation_in_words
from raytune.plan.strategies.divergence import guard_in_words
from raytune.plan.strategies.objective import objective_in_words
from raytune.plan.strategies.penalty import importance_in_words, penalty_in_words
from raytune.plan.strategies.stopping import rules_in_words
from raytune.units import format_bytes, format_count, format_dollars, format_seconds

PLACES: dict[Place, str] = {"device": "memory per worker", "host": "host memory per worker", "nvme": "NVMe per worker"}

MOST_GROUPS = 6
"""Lines of rates that are shown; an even number."""
MOST_NAMES = 4
"""Modules that a line of rates names."""

MOMENT_NAMES: dict[Moment, str] = {
    "teacher": "the teacher's forward pass",
    "forward": "the forward pass's end",
    "loss": "the loss's backward pass",
    "last layer": "the last layer's backward pass",
    "first layer": "the first layer's backward pass",
    "update": "the update",
}


def plan_table(plan: RunPlan) -> list[tuple[str, str]]:
    """What is going to happen, as (label, value) lines."""
    return [
        ("model", f"{plan.model.path}, {format_count(plan.num_parameters)} parameters in {plan.model.dtype}"),
        ("method", _method(plan)),
        *([("positions", rope_in_words(plan.model.rope))] if plan.model.rope else []),
        ("data", _data(plan)),
        *(report_table(plan.data_report) if plan.data_report else []),
        *_mixture(plan),
        ("batch", plan.batch.in_words(_row(plan))),
        ("run", _length(plan)),
        ("optimizer", _optimizer(plan)),
        *_objective(plan),
        *_penalty(plan),
        *_distillation(plan),
        *_averaging(plan),
        *_phases(plan),
        *_rates(plan),
        ("precision", plan.precision + (", TF32 products allowed" if plan.tf32 and plan.cluster.device == "cuda" else "")),
        ("engine", _engine(plan)),
        ("attention", plan.model.attention),
        *([("kernels", "Liger's, where it has any for the model")] if plan.model.liger else []),
        ("loss", f"{plan.loss.chunk_tokens} targets at a time" if plan.loss.chunk_tokens else "all targets at once"),
        ("evaluation", _evaluation(plan)),
        *(("base and tuned", suite_in_words(suite)) for suite in plan.evaluation.suites),
        *_while_training(plan),
        ("checkpoints", _checkpoints(plan)),
        *_stopping(plan),
        *_divergence(plan),
        *_memory(plan.memory),
        *_time(plan),
        *_money(plan),
    ]


def plan_text(plan: RunPlan) -> str:
    """The table in aligned columns; below it what is to be noted, what is lost of the data, and why what was chosen."""
    rows = plan_table(plan)
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:<{width}}  {value}" for label, value in rows]
    losses = losses_text(plan.data_report) if plan.data_report else []
    sections = {
        "To be noted:": plan.notes,
        "Rows that are not used as they are:": losses,
        "Chosen automatically:": plan.reasons,
    }
    return "\n".join([*lines, *(line for heading, told in sections.items() for line in section(heading, told))])


def section(heading: str, lines: Sequence[str]) -> list[str]:
    """Lines of a text below its table; none if there is nothing to say."""
    return ["", heading, *(f"  {line}" for line in lines)] if lines else []


def comparison_text(candidates: Sequence[Candidate]) -> str:
    """Instance types for a job in aligned columns, in the order given; below, why some cannot hold it."""
    heading = ("instance", "nodes", "GPUs", "ZeRO", "per GPU", "step", "tokens/s", "binds", "time", "on demand", "spot")
    rows = [heading, *(_candidate_row(one.plan) for one in candidates if one.plan)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    refused = [f"  {one.instance.name}: {_first_sentence(one.refusal or '')}" for one in candidates if not one.plan]
    return "\n".join([*lines, *(["", "No room for it on:", *refused] if refused else [])])


def advice_text(advised: Advised) -> str:
    """Methods for a job in aligned columns, and what each is for; below, why some cannot be taken, and what was assumed."""
    planned = [(one, one.plan) for one in advised.methods if one.plan]
    has_cost = any(plan.cost for _, plan in planned)
    heading = ("method", "trained", "per worker", "ZeRO", "checkpoint", *(("time", "on demand") if has_cost else ()), "when")
    rows = [heading, *(_advice_row(one, plan, has_cost) for one, plan in planned)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    refused = [f"{one.method}: {_in_short(one.refusal)}" for one in advised.methods if one.refusal]
    return "\n".join([*lines, *section("Not possible here:", refused), "", advised.assumption])


def _in_short(refusal: str) -> str:
    """What does not fit and what would, without the parts in between."""
    way_out = refusal.find("What would fit:")
    return refusal if way_out < 0 else f"{_first_sentence(refusal)} {refusal[way_out:]}"


def _advice_row(one: Advice, plan: RunPlan, has_cost: bool) -> tuple[str, ...]:
    cost = plan.cost
    money = (format_seconds(3600 * cost.hours), format_dollars(cost.usd) if cost.usd else "-") if cost else ("-", "-")
    place: Place = "device" if bytes_in(plan.memory, "device") else "host"
    return (
        one.method,
        f"{format_count(plan.num_trainable)} ({100 * plan.num_trainable / plan.num_parameters:.3g} %)",
        format_bytes(bytes_in(plan.memory, place)),
        _zero(plan),
        format_bytes(plan.checkpoint_bytes),
        *(money if has_cost else ()),
        one.when,
    )


def _candidate_row(plan: RunPlan) -> tuple[str, ...]:
    step, cost = plan.step_time, plan.cost
    assert step is not None
    assert cost is not None
    return (
        cost.instance,
        str(cost.num_nodes),
        str(plan.batch.workers),
        _zero(plan),
        format_bytes(bytes_in(plan.memory, "device")),
        _short_time(step.seconds),
        format_count(step.tokens_per_s),
        step.binds,
        format_seconds(3600 * cost.hours),
        format_dollars(cost.usd) if cost.usd else "-",
        "-" if cost.spot_usd is None else format_dollars(cost.spot_usd),
    )


def _zero(plan: RunPlan) -> str:
    """What ZeRO shards, or the workers without it, and whether activations are computed again."""
    return f"{plan.engine.zero_stage}{' +base' * plan.engine.shards_base}{' +ckpt' * plan.model.gradient_checkpointing}"


def _first_sentence(text: str) -> str:
    return text.split(" (", 1)[0] + "."


def _short_time(seconds: float) -> str:
    return f"{seconds:.2g}s" if seconds < 1 else format_seconds(seconds)


def _method(plan: RunPlan) -> str:
    share = 100 * plan.num_trainable / plan.num_parameters
    trained = f"{format_count(plan.num_trainable)} trained parameters ({share:.3g}% of the base)"
    held = f" over a base in {plan.model.quantization.format}" if plan.model.quantization else ""
    return method_of(plan.adapter).in_words(plan.adapter, held, trained)


def _data(plan: RunPlan) -> str:
    train = plan.data.train
    fill = train.num_tokens / (train.num_rows * plan.data.row_length)
    held_out = "".join(f"; {store.name}: {store.num_rows} {_row(plan)}s" for store in plan.data.validation)
    tested = ", ".join(f"{store.name} {store.num_rows} {_row(plan)}s" for store in plan.data.test)
    tested = f"; measured once, at the end: {tested}" if tested else ""
    stream = plan.data.stream
    is_read = "the first of which is" if train.path else "taken to have"
    of = f"streamed in windows of {stream.window} rows, {is_read} " if stream else ""
    return (
        f"{of}{train.num_rows} {_row(plan)}s of up to {plan.data.row_length} tokens ({fill:.0%} full), "
        f"{format_count(train.num_targets)} target tokens{held_out}{tested}"
    )


def _row(plan: RunPlan) -> str:
    """What a row of the store is."""
    report = plan.data_report
    num_documents = sum(source.in_epoch.documents for source in report.train.sources) if report else None
    return "document" if not plan.model.packs or num_documents == plan.data.train.num_rows else "packed row"


def _length(plan: RunPlan) -> str:
    train, rows_per_step = plan.data.train, plan.batch.global_batch_size
    tokens = train.num_tokens / train.num_rows * rows_per_step
    epochs = "" if plan.data.stream is not None else f"{_epochs(plan):.3g} epochs, "
    return f"{plan.optimization.num_steps} steps, {epochs}about {format_count(tokens)} tokens per step"


def _optimizer(plan: RunPlan) -> str:
    settings = plan.optimization
    rates = [phase.learning_rate for phase in settings.phases] or [settings.learning_rate]
    by_phase = f"{min(rates):g} to {max(rates):g} by phase"
    rate = by_phase if min(rates) < max(rates) else f"{rates[0]:g}"
    return (
        f"{settings.optimizer}, learning rate {rate} ({settings.schedule}, "
        f"{_warmup_text(settings.warmup_steps)}), weight decay {settings.weight_decay:g}"
    )


def _mixture(plan: RunPlan) -> list[tuple[str, str]]:
    if plan.data.stream is not None:
        return [("streams" if index == 0 else "", line) for index, line in enumerate(stream_in_words(plan.data.stream))]
    lines = mixture_in_words(plan.data_report.train, _epochs(plan)) if plan.data_report else []
    return [("mixture" if index == 0 else "", line) for index, line in enumerate(lines)]


def _epochs(plan: RunPlan) -> float:
    return plan.optimization.num_rows / plan.data.train.num_rows


def _objective(plan: RunPlan) -> list[tuple[str, str]]:
    words = objective_in_words(plan.optimization)
    return [("objective", words)] if words else []


def _penalty(plan: RunPlan) -> list[tuple[str, str]]:
    lines = {"penalty": penalty_in_words(plan), "importance": importance_in_words(plan)}
    return [(label, words) for label, words in lines.items() if words]


def _distillation(plan: RunPlan) -> list[tuple[str, str]]:
    words = distillation_in_words(plan.distillation, plan.model.path)
    return [("teacher", words)] if words else []


def _averaging(plan: RunPlan) -> list[tuple[str, str]]:
    words = averaging_in_words(plan)
    return [("averaging", words)] if words else []


def _rates(plan: RunPlan) -> list[tuple[str, str]]:
    """A line for each group of modules with settings of its own, the highest first, long lists without their middle."""
    settings = plan.optimization
    groups = settings.update_groups[::-1]
    lines = [f"learning rate {settings.learning_rate:.3g} (x 1): whatever else is trained"] if groups else []
    for group in groups:
        decay = "" if group.weight_decay is None else f", weight decay {group.weight_decay:g}"
        rate = f"learning rate {settings.learning_rate * group.rate_scale:.3g} (x {group.rate_scale:.3g})"
        lines.append(f"{rate}{decay}: {_some(group.modules)}")
    if len(lines) > MOST_GROUPS:
        left_out = len(lines) - MOST_GROUPS
        half = MOST_GROUPS // 2
        lines = [*lines[:half], f"... {left_out} others between these ...", *lines[-half:]]
    return [("rates" if index == 0 else "", line) for index, line in enumerate(lines)]


def _phases(plan: RunPlan) -> list[tuple[str, str]]:
    """A line for each phase: when it is, what it trains, and what that takes."""
    phases = plan.optimization.phases
    ends = [*(phase.first_step for phase in phases[1:]), plan.optimization.num_steps]
    lines = []
    for phase, needs, end in zip(phases, plan.phase_needs, ends):
        share = 100 * needs.num_trainable / plan.num_parameters
        warm_up = f", {_warmup_text(phase.warmup_steps)}" if phase.warmup_steps else ""
        place: Place = "device" if bytes_in(needs.memory, "device") else "host"
        time = f", {_short_time(needs.step_time.seconds)} a step" if needs.step_time else ""
        lines.append(
            f"steps {phase.first_step + 1} to {end}: {needs.trains}, {format_count(needs.num_trainable)} ({share:.3g}%) trained; "
            f"learning rate {phase.learning_rate:g}{warm_up}; {format_bytes(bytes_in(needs.memory, place))} per worker, "
            f"checkpoints {format_bytes(needs.checkpoint_bytes)}{time}"
        )
    return [("phases" if index == 0 else "", line) for index, line in enumerate(lines)]


def _some(names: list[str]) -> str:
    if len(names) <= MOST_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[: MOST_NAMES - 1])}, ... {names[-1]} ({len(names)} modules)"


def _warmup_text(steps: int) -> str:
    return f"{steps} warm-up step{'s' * (steps != 1)}, the first at rate 0" if steps else "no warm-up"


def _engine(plan: RunPlan) -> str:
    engine = plan.engine
    held = "layers of the base divided among the workers" if engine.shards_base else "whole weights on every worker"
    words = [f"PyTorch, {held}" if engine.kind == "plain" else f"DeepSpeed ZeRO stage {engine.zero_stage}"]
    words += ["a copy of the weights in each node"] if engine.copy_over > 1 else []
    words += [f"optimizer on {engine.offload_optimizer}"] if engine.offload_optimizer != "none" else []
    words += [f"weights on {engine.offload_parameters}"] if engine.offload_parameters != "none" else []
    words += ["activation checkpointing"] if plan.model.gradient_checkpointing else []
    return ", ".join(words)


def _evaluation(plan: RunPlan) -> str:
    if not plan.data.validation:
        return "none: no validation rows"
    at_saves = f" and every {in_steps(plan.checkpoint.every_steps)}" if plan.evaluation.at_saves else ""
    at_start = " and before the first" if plan.evaluation.at_start else ""
    return f"every {in_steps(plan.evaluation.every_steps)}{at_saves} steps, after the last{at_start}"


def _while_training(plan: RunPlan) -> list[tuple[str, str]]:
    words = while_training_in_words(plan)
    return [("while training", words)] if words else []


def _checkpoints(plan: RunPlan) -> str:
    settings = plan.checkpoint
    best = f", the {settings.keep_best} best by {settings.metric}" if settings.keep_best else ""
    size = f"{'up to ' * bool(plan.optimization.phases)}{format_bytes(plan.checkpoint_bytes)}"
    waits = "" if settings.snapshot else "; training waits while they are written"
    return f"every {in_steps(settings.every_steps)} steps, {size} each{waits}; kept: the last {settings.keep_last}{best}"


def _stopping(plan: RunPlan) -> list[tuple[str, str]]:
    words = rules_in_words(plan.stopping, plan.evaluation)
    label = "ends early" if plan.stopping.may_end else "looks out"
    return [(label, words)] if words else []


def _divergence(plan: RunPlan) -> list[tuple[str, str]]:
    words = guard_in_words(plan)
    return [("divergence", words)] if words else []


def _memory(memory: list[MemoryPart]) -> list[tuple[str, str]]:
    lines = []
    for place, label in PLACES.items():
        moment = fullest_moment(memory, place)
        there = parts_at(memory, place, moment)
        elsewhen = [part for part in memory if part.place == place and part not in there]
        if there:
            when = f" at the fullest moment, {MOMENT_NAMES[moment]}" if elsewhen else ""
            others = f"; at others: {_listed(elsewhen)}" if elsewhen else ""
            lines.append((label, f"{format_bytes(bytes_in(memory, place))}{when}: {_listed(there)}{others}"))
    return lines


def _listed(parts: list[MemoryPart]) -> str:
    largest_first = sorted(parts, key=lambda part: -part.num_bytes)
    return " + ".join(f"{part.name} {format_bytes(part.num_bytes)}" for part in largest_first)


def _time(plan: RunPlan) -> list[tuple[str, str]]:
    if plan.step_time is None:
        return []
    step, when = plan.step_time, " in the last phase" if plan.optimization.phases else ""
    overlapped = {"communication": step.communication_s, "offload": step.offload_s}
    exchange = f" + exchange of heads {_short_time(step.exchange_s)}" if step.exchange_s else ""
    beside = "".join(f", beside {name} {_short_time(seconds)}" for name, seconds in overlapped.items() if seconds)
    return [
        (
            "time per step",
            f"{_short_time(step.seconds)}{when}: products {_short_time(step.compute_s)} + memory traffic "
            f"{_short_time(step.memory_s)}{exchange}{beside}; {step.binds} binds; {format_count(step.tokens_per_s)} tokens/s",
        )
    ]


def _money(plan: RunPlan) -> list[tuple[str, str]]:
    if plan.cost is None:
        return []
    cost = plan.cost
    nodes = f"{cost.num_nodes} x {cost.instance}"
    spot = "no spot price known" if cost.spot_usd is None else f"{format_dollars(cost.spot_usd)} spot"
    price = f"{format_dollars(cost.usd)} on demand, {spot} (list prices of {cost.price_date})" if cost.usd else "not rented"
    kind = "spot" if cost.is_spot else "on demand"
    return [
        ("all steps", f"{format_seconds(3600 * cost.hours)} on {nodes}: {price}"),
        (
            "interruptions",
            f"one in {format_seconds(cost.between_interruptions_s)} ({kind}, assumed) costs about "
            f"{format_seconds(cost.lost_s_per_interruption)} and {format_dollars(cost.lost_usd_per_interruption)} with a save "
            f"every {format_seconds(cost.save_every_s)}, which loses least",
        ),
    ]
