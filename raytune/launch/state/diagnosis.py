"""What looks wrong with a run, in words, and which key to change. Pure: what was measured in, symptoms out.

Each rule is a function of an `Evidence` and a row of `RULES`. They are rules of thumb on purpose slow to speak: a run that is
healthy has none (`tests/cases/diagnosis` holds what real runs measured that were made to go wrong, and of healthy ones).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Self

from raytune.config.sections.divergence import DivergenceSection
from raytune.credentials import redacted
from raytune.launch.state.outcome import Change, Spent, spent
from raytune.metrics.history import History
from raytune.metrics.points import seconds_per_step
from raytune.plan.costs.memory import bytes_in, tensor_bytes
from raytune.plan.run_plan import RunPlan
from raytune.printable import plain_text
from raytune.training.steps.spikes import Logged, spike_at
from raytune.training.steps.stopping import TRAINING_LOSS, VALIDATION_LOSS
from raytune.units import format_bytes, format_seconds

FEWEST = 8
"""Logged steps before a curve says anything."""
WINDOW_SHARE = 8
"""The level at an end of a curve is the median of one in so many of its values."""
MOST_WINDOWS, MOST_LOGGED = 64, 20_000
"""Levels that are looked at, and last logged steps in which spikes are: a curve of a million steps takes seconds."""
FLAT, SLOW = 0.01, 0.1
"""Share of the opening loss by which a run has to fall: less than the first is not falling, less than the second may be slow."""
STILL_FALLING = 0.35
"""Share of the fall that lies in the second half of all rates; half of it in a run that learns as it began, little in one that
has learnt what there is."""
RISEN = 0.1
"""Share of the opening loss by which a loss is clearly above its lowest."""
ROUGH = 0.2
"""Share of the opening loss by which three logged losses may be above it."""
OVERFIT = 0.05
"""By so much, of the best, a validation loss has to rise."""
NOISE = 0.005
"""And by so much of the first, so that noise around 0 is none."""
FORGOTTEN = 0.05
"""By so much, of the base's, the loss on a data set has to rise."""
MANY_PASSES, FEW_DOCUMENTS = 8, 1000
UNDERFILLED = 0.5
SLOWER, FULLER = 2.0, 1.1
"""Measured against planned."""
OUTSIDE, LEAST_OUTSIDE_S = 0.5, 60.0
"""Share of the training time that is spent on other things than steps, and seconds below which it does not matter."""
WAITED = 0.2
"""Share of a step in which nothing is done but to wait for rows."""
MANY_ROWS = 0.1
"""Share of the rows of a source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Symptom:
    """Something that looks wrong."""

    name: str
    words: str
    key: str
    """What to change first."""
    advice: str

    @property
    def sentence(self) -> str:
        return f"Looks wrong: {self.words} Change {self.key}: {self.advice}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known of a run, finished or not."""

    plan: RunPlan
    history: History
    failure: str | None = None
    """What ended it, or its newest failed attempt."""
    changes: Sequence[Change] = ()
    failed_metrics: Sequence[str] = ()
    """Why metrics of the user's have failed."""
    spent: Spent | None = None
    step_s: float | None = None
    """Seconds of a step, the median."""
    peak_bytes: float | None = None
    """Of the rank that held most, while the run goes on of rank 0; on a GPU by the allocator, of the process otherwise."""

    @classmethod
    def of(
        cls,
        plan: RunPlan,
        history: History,
        events: Sequence[Mapping[str, Any]],
        changes: Sequence[Change],
        *,
        failed_metrics: Sequence[str] = (),
        failure: str | None = None,
        step_s: float | None = None,
        peak_bytes: float | None = None,
    ) -> Self:
        """Of what a run folder has, without credentials; what is not known of a whole run is that of its history.

        Args:
            events: of events.jsonl, in their order.
        """
        causes = [event["cause"] for event in events if event["event"] == "attempt_failed"]
        failure = failure or (causes[-1] if causes else None)
        return cls(
            plan=plan,
            history=history,
            failure=redacted(plain_text(failure)) if failure else None,
            changes=changes,
            failed_metrics=failed_metrics,
            spent=spent(events, history, plan.cost),
            step_s=step_s or seconds_per_step(history.points) or None,
            peak_bytes=peak_bytes or history.as_of(history.last_step).get("train/memory_bytes"),
        )

    @property
    def wait_s(self) -> float:
        """Seconds of a step in which a worker waits for its rows, the median."""
        return median([wait for _, wait in self.history.series("train/wait_s")] or [0.0])

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of training."""
        return [(step, loss) for step, loss in self.history.series(TRAINING_LOSS) if math.isfinite(loss)]


def diagnose(evidence: Evidence) -> list[Symptom]:
    """Everything that looks wrong, the gravest first. Where a loss cannot be trusted, slower symptoms of it are not told too."""
    found: list[Symptom] = []
    for group in RULES:
        told = [symptom for rule in group for symptom in rule(evidence)]
        found += told[:1] if group is OF_THE_CURVE else told
    return found


# --- The loss ----------------------------------------------------------------------------------------------------------------


def not_finite(evidence: Evidence) -> Iterator[Symptom]:
    """A loss, gradient or validation loss that is no number."""
    measured = next(
        (
            f"{name} of step {point.step}"
            for point in evidence.history.points
            for name, value in point.values.items()
            if name in (TRAINING_LOSS, VALIDATION_LOSS) and not math.isfinite(value)
        ),
        None,
    )
    said = evidence.failure if evidence.failure and "is not finite" in evidence.failure else None
    if said or measured:
        precision = " fp16 overflows where bf16 does not (training.precision)." if evidence.plan.precision == "fp16" else ""
        yield Symptom(
            name="not_finite",
            words=f"A loss is no number any more: {said or f'{measured} is not finite'}",
            key="training.learning_rate",
            advice=f"Lower the rate tenfold, or warm up for longer.{precision} training.divergence.policy=roll_back goes back to "
            "a checkpoint and on at a lower rate. If it is the first step, look at the rows that the message names.",
        )


def rate_too_high(evidence: Evidence) -> Iterator[Symptom]:
    """A training loss that ends, or was for long, clearly above where it began or had been."""
    losses = [loss for _, loss in evidence.losses]
    if len(losses) < FEWEST:
        return
    first, last = opening(losses), closing(losses)
    smooth = smoothed(losses)
    lowest = min(smooth)
    top = max(median(losses[at : at + 3]) for at in range(len(losses) - 2))  # of three, so that it is no single spike
    if last > lowest + RISEN * first:
        words = f"The training loss rose to {last:.4g} after it had been {lowest:.4g}."
    elif top > (1 + ROUGH) * (start := median(losses[:3])):
        words = f"The training loss rose from {start:.4g} to {top:.4g} before it fell."
    else:
        return
    yield Symptom(
        name="rate_too_high",
        words=words,
        key="training.learning_rate",
        advice=f"Divide {evidence.plan.optimization.learning_rate:g} by 3 to 10; raytune find-rate tries a range. A longer "
        "warm-up (training.warmup_steps) helps where it is only the beginning that is rough.",
    )


def spikes(evidence: Evidence) -> Iterator[Symptom]:
    """Single logged steps whose loss is far above those before."""
    losses = evidence.losses[-MOST_LOGGED:]
    rule = DivergenceSection(watch="loss")
    logged = [Logged(step=step, values={TRAINING_LOSS: loss}) for step, loss in losses]
    high = RISEN * opening([loss for _, loss in evidence.losses]) if losses else 0.0
    seen = [spike_at(logged, index, rule) for index in range(len(logged))]
    found = [spike for spike in seen if spike and spike.value - spike.median > high]
    if found:
        worst = max(found, key=lambda spike: spike.value - spike.median)
        count = f"{len(found)} spike{'s' * (len(found) != 1)} of the training loss"
        yield Symptom(
            name="spikes",
            words=f"{count}: the highest is {worst.value:.4g} at step {worst.step}, where {worst.median:.4g} was ordinary.",
            key="training.divergence.policy",
            advice="skip leaves out updates whose gradient is a spike; a lower training.learning_rate or max_grad_norm makes "
            "them rarer. If it is always the same rows, look at those.",
        )


def not_falling(evidence: Evidence) -> Iterator[Symptom]:
    """A training loss that is where it began, or that falls so slowly that the rate must be too low."""
    losses = [loss for _, loss in evidence.losses]
    first, last = (opening(losses), closing(losses)) if len(losses) >= FEWEST else (0.0, 0.0)
    if first <= 0:
        return
    fall = (first - last) / first
    validation = [loss for _, loss in evidence.history.series(VALIDATION_LOSS)]
    falls_steadily = (
        len(validation) >= 3
        and all(after < before for before, after in pairwise(validation))
        and validation[0] - validation[-1] >= FLAT / 10 * validation[0]  # else ten times the rate would not do either
    )
    rate = evidence.plan.optimization.learning_rate
    if (FLAT <= fall < SLOW and late_share(evidence) >= STILL_FALLING) or (fall < FLAT and falls_steadily):
        yield Symptom(
            name="rate_too_low",
            words=f"The training loss fell by {fall:.1%} only ({first:.4g} to {last:.4g}), and at its end as fast as before.",
            key="training.learning_rate",
            advice=f"Multiply {rate:g} by 3 to 10; raytune find-rate tries a range. If the rate is what it should be, train for "
            "longer (training.num_train_epochs).",
        )
    elif fall < FLAT:
        yield Symptom(
            name="not_falling",
            words=f"The training loss did not fall: {first:.4g} at the beginning, {last:.4g} at the end.",
            key="training.learning_rate",
            advice=f"raytune find-rate says whether a rate other than {rate:g} learns. If none does, look at what is a target "
            "(data.targets, data.template) and at what is trained (adapter, strategy.freeze).",
        )


def out_of_memory(evidence: Evidence) -> Iterator[Symptom]:
    """An attempt that ended because memory was full."""
    if evidence.failure and "OutOfMemory" in evidence.failure:
        yield Symptom(
            name="out_of_memory",
            words=f"Memory was full: {evidence.failure}",
            key="training.per_device_train_batch_size",
            advice="Halve it (the global batch stays the same by accumulation), or set training.gradient_checkpointing=true, a "
            "higher training.zero.stage, or a smaller data.max_length.",
        )


# --- What it has learnt ------------------------------------------------------------------------------------------------------


def overfitting(evidence: Evidence) -> Iterator[Symptom]:
    """A validation loss that rises behind its best while the training loss falls."""
    curve = [(step, loss) for step, loss in evidence.history.series(VALIDATION_LOSS) if math.isfinite(loss)]
    if len(curve) < 3:
        return
    (step, best), (last_step, last) = min(curve, key=lambda pair: pair[1]), curve[-1]
    until = [loss for at, loss in evidence.losses if at <= step]
    since = [loss for at, loss in evidence.losses if at > step]
    if step == 0 or not until or not since:
        return
    if last - best > max(OVERFIT * best, NOISE * curve[0][1]) and closing(since) < closing(until):
        stopping = evidence.plan.stopping
        early = "" if stopping.may_end else " training.early_stopping would have ended the run there."
        kept = " The model is that of the best evaluation." if evidence.plan.checkpoint.keep_best else ""
        yield Symptom(
            name="overfitting",
            words=f"Overfitting: the validation loss was best at step {step} ({best:.4g}) and is {last:.4g} at step {last_step}, "
            f"while the training loss went on falling.{kept}",
            key="training.num_train_epochs",
            advice=f"Train for less long, on more rows, or with fewer trained weights (adapter.rank, adapter.dropout).{early}",
        )


def few_rows(evidence: Evidence) -> Iterator[Symptom]:
    """Few documents that are trained again and again."""
    plan = evidence.plan
    if plan.data.stream is not None:
        return
    passes = plan.optimization.num_rows / max(1, plan.data.train.num_rows)
    report = plan.data_report
    documents = sum(source.in_epoch.documents for source in report.train.sources) if report else plan.data.train.num_rows
    if passes >= MANY_PASSES and documents < FEW_DOCUMENTS:
        yield Symptom(
            name="few_rows",
            words=f"Each of only {documents} documents is trained {passes:.0f} times: the model may learn them by heart.",
            key="data.train",
            advice="More and other rows help most. Without them, train for fewer epochs (training.num_train_epochs); "
            "preset=small_data has defaults for this.",
        )


def forgetting(evidence: Evidence) -> Iterator[Symptom]:
    """A data set whose loss has risen, or a suite whose answers have become worse."""
    worse = [
        change
        for change in evidence.changes
        if change.is_worse
        and (
            change.kind == "score"
            or (change.kind == "loss" and change.name != VALIDATION_LOSS and change.gain > FORGOTTEN * abs(change.base))
        )
    ]
    if worse:
        yield Symptom(
            name="forgetting",
            words=f"The model is worse than its base at something: {'; '.join(change.sentence for change in worse)}.",
            key="strategy.replay",
            advice="Replay rows of what is not to be forgotten, hold the weights near the base (strategy.l2_sp, strategy.ewc), "
            "lower the rate, or train an adapter of a smaller rank.",
        )


def failed_metrics(evidence: Evidence) -> Iterator[Symptom]:
    """Functions of the user's that could not judge the answers."""
    for why in evidence.failed_metrics:
        yield Symptom(
            name="failed_metric",
            words=f"A metric of your own has failed: {why}",
            key="evaluation.suites",
            advice="Correct the function: it has to take whatever a model writes. The run has ended well without it, and "
            "samples.jsonl has all answers.",
        )


# --- Rows --------------------------------------------------------------------------------------------------------------------


def underfilled(evidence: Evidence) -> Iterator[Symptom]:
    """Rows that are mostly padding."""
    plan, train = evidence.plan, evidence.plan.data.train
    fill = train.num_tokens / max(1, train.num_rows * plan.data.row_length)
    if not plan.model.packs or fill >= UNDERFILLED:
        return
    report = plan.data_report
    alone = report is not None and sum(source.in_epoch.documents for source in report.train.sources) == train.num_rows
    yield Symptom(
        name="underfilled",
        words=f"Rows of {plan.data.row_length} tokens are only {fill:.0%} full on average.",
        key="data.packing" if alone else "data.max_length",
        advice="data.packing=best_fit lets documents share rows; or make data.max_length as long as the longest document.",
    )


def lost_rows(evidence: Evidence) -> Iterator[Symptom]:
    """Rows that are cut, unreadable, or trained otherwise than they are meant."""
    for source in evidence.plan.data_report.train.sources if evidence.plan.data_report else ():
        rows = max(1, source.rows)
        for name, count, key, what, advice in (
            (
                "cut_rows",
                source.cut,
                "data.max_length",
                "lost targets to data.max_length",
                "Raise it, or split texts that are too long.",
            ),
            ("bad_rows", source.bad, "data.train", "cannot be read", "The plan names the first of them with file and line."),
            ("no_targets", source.no_target, "data.targets", "have no target", "Is data.targets what is to be learnt?"),
            (
                "no_end",
                source.unending,
                "data.template",
                "end in no special token, so that the model may not learn to stop",
                "Choose the template of the base, or one that writes the end of an answer.",
            ),
        ):
            if count > MANY_ROWS * rows:
                words = f"{count} of {source.rows} rows of {source.name} {what}."
                yield Symptom(name=name, words=words, key=key, advice=advice)
        if source.prompts_differ:
            yield Symptom(
                name="prompts_differ",
                words=f"{source.prompts_differ} of {source.prompts_compared} answers of {source.name} are trained behind other "
                "tokens than their prompt has: in use the model will see something else.",
                key="data.template",
                advice="Choose the template that the model is used with.",
            )


# --- The machine -------------------------------------------------------------------------------------------------------------


def data_bound(evidence: Evidence) -> Iterator[Symptom]:
    """Steps that wait for their rows."""
    step_s, wait_s = evidence.step_s, evidence.wait_s
    if step_s and wait_s > WAITED * step_s:
        yield Symptom(
            name="data_bound",
            words=f"Workers wait for rows in {wait_s:.3g} s of the {step_s:.3g} s that a step takes.",
            key="data.store",
            advice="Where the tokenised rows lie is slow, far off, or read by others too: name a folder on a faster disk or file "
            "system that every node reads. What a node has read once its free memory keeps.",
        )


def slow_steps(evidence: Evidence) -> Iterator[Symptom]:
    """Steps that take much longer than products, memory traffic and communication account for, waiting for rows aside."""
    plan = evidence.plan
    planned = None if plan.optimization.phases else plan.step_time
    if planned and evidence.step_s and evidence.step_s - evidence.wait_s > SLOWER * planned.seconds:
        yield Symptom(
            name="slow_steps",
            words=f"A step takes {evidence.step_s:.3g} s, and {planned.seconds:.3g} s were planned.",
            key="cluster.instance",
            advice="The plan counts products, memory traffic and communication as that machine has them: are the workers' "
            "others, are they shared, or is their network slower? raytune preflight tells.",
        )


def much_besides(evidence: Evidence) -> Iterator[Symptom]:
    """Evaluations and saves that take longer than training."""
    took, steps = evidence.spent, evidence.history.last_step
    if not took or not evidence.step_s or took.attempts != 1:
        return
    besides = took.training_s - steps * evidence.step_s
    if besides > max(LEAST_OUTSIDE_S, OUTSIDE * took.training_s):
        yield Symptom(
            name="much_besides",
            words=f"{format_seconds(besides)} of {format_seconds(took.training_s)} went into evaluations and saves.",
            key="evaluation.every_steps",
            advice="Evaluate and save less often (checkpoint.every_steps), or on fewer rows (evaluation.max_rows).",
        )


def memory_off(evidence: Evidence) -> Iterator[Symptom]:
    """A peak far from the planned one; on a CPU, where the plan is a bound, above it."""
    plan, peak = evidence.plan, evidence.peak_bytes
    is_gpu = plan.cluster.device == "cuda"
    planned = tensor_bytes(plan.memory) if is_gpu else bytes_in(plan.memory, "device")
    if not peak or not planned:
        return
    if peak > FULLER * planned:
        yield Symptom(
            name="memory_above_plan",
            words=f"A worker held {format_bytes(peak)} at its fullest, and {format_bytes(planned)} were planned.",
            key="training.per_device_train_batch_size",
            advice="There is less room than the plan says: leave the batch as it is, and look for what else runs on the machine.",
        )
    elif is_gpu and peak < planned / SLOWER:
        yield Symptom(
            name="memory_below_plan",
            words=f"A worker held {format_bytes(peak)} at its fullest, and {format_bytes(planned)} were planned.",
            key="training.per_device_train_batch_size",
            advice="There is more room than the plan says: a larger value may be faster.",
        )


# --- Levels of a curve -------------------------------------------------------------------------------------------------------


def opening(values: Sequence[float]) -> float:
    """Level at which a curve begins."""
    return median(values[: max(1, len(values) // WINDOW_SHARE)])


def closing(values: Sequence[float]) -> float:
    """Level at which a curve ends."""
    return median(values[-max(1, len(values) // WINDOW_SHARE) :])


def smoothed(values: Sequence[float]) -> list[float]:
    """Medians of windows along a curve, of some dozens on a long one."""
    width, apart = max(1, len(values) // WINDOW_SHARE), max(1, len(values) // MOST_WINDOWS)
    return [median(values[at : at + width]) for at in range(0, len(values) - width + 1, apart)]


def late_share(evidence: Evidence) -> float:
    """Share of the fall of the training loss that lies behind the step at which half of all rates had been spent.

    Equal rates then count alike whatever the schedule: one that decays learns less at its end for that reason alone.
    """
    losses = evidence.losses
    rates = dict(evidence.history.series("train/learning_rate"))
    by_step = [rates.get(step, 0.0) for step, _ in losses]
    half, total = 0.0, sum(by_step)
    middle = 0
    while middle < len(losses) - 1 and half < total / 2:
        half += by_step[middle]
        middle += 1
    values = [loss for _, loss in losses]
    width = max(1, len(values) // WINDOW_SHARE)
    between = median(values[max(0, middle - width // 2) : middle + (width + 1) // 2])
    first, last = opening(values), closing(values)
    return (between - last) / (first - last) if first > last else 0.0


Rule = Callable[[Evidence], Iterator[Symptom]]
OF_THE_CURVE: tuple[Rule, ...] = (not_finite, rate_too_high, not_falling)
"""Of these the first that speaks is told: what follows it follows from it."""
RULES: tuple[tuple[Rule, ...], ...] = (
    (out_of_memory,),
    OF_THE_CURVE,
    (spikes,),
    (overfitting, few_rows, forgetting, failed_metrics),
    (lost_rows, underfilled),
    (data_bound, slow_steps, much_besides, memory_off),
)
"""The gravest first."""
