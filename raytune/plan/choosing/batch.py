"""The batch equation: workers x rows per forward pass x accumulation = rows per optimizer step."""

from raytune.config.sections.training import TrainingSection
from raytune.errors import UserError
from raytune.plan.run_plan import BatchPlan

DEFAULT_ROWS = 16
MIN_STEPS = 20


def default_rows_per_step(num_rows: int, rows_in_epochs: int | None) -> int:
    """16 packed rows per step (32k tokens at 2,048 per row), fewer where a run would have less than 20 steps.

    16 is QLoRA's number for most sizes (Dettmers et al. 2023, appendix B).

    Args:
        num_rows: rows of the store.
        rows_in_epochs: rows over all epochs, or None when the number of steps is given.
    """
    most = num_rows if rows_in_epochs is None else rows_in_epochs // MIN_STEPS
    return max(1, min(DEFAULT_ROWS, most))


def possible_batches(
    training: TrainingSection, workers: int, wanted_rows: int, max_micro_batch: int, enough: int | None = None
) -> list[BatchPlan]:
    """Every way to solve the equation as asked, largest micro-batch first. All have the same rows per step.

    Args:
        training: any two of rows per step, micro-batch and accumulation fix the third.
        workers: training processes, of which `training.sequence_parallel_size` share each row.
        wanted_rows: rows per step where the config does not say.
        max_micro_batch: largest micro-batch that is chosen where the config does not say.
        enough: micro-batch above which none is, where one is possible that has as many rows; None: the largest.

    Raises:
        UserError: if there is no whole solution; the message names the nearest ones.
    """
    total, micro, accumulation = (
        None if value == "auto" else value
        for value in (training.global_batch_size, training.per_device_train_batch_size, training.gradient_accumulation_steps)
    )
    size = training.sequence_parallel_size
    groups = workers // size
    unit = groups * (micro or 1) * (accumulation or 1)
    if total is None:
        total = unit if micro and accumulation else unit * max(1, wanted_rows // unit)
    elif total % unit or (micro and accumulation and total != unit):
        raise UserError(_no_solution(total, workers, size, micro, accumulation))
    rows_per_group = total // groups
    if micro:
        sizes = [micro]
    elif accumulation:
        sizes = [rows_per_group // accumulation]
    else:
        sizes = [rows for rows in range(min(max_micro_batch, rows_per_group), 0, -1) if rows_per_group % rows == 0]
        large = [rows for rows in sizes if enough is not None and rows >= enough]
        sizes = sizes[max(0, len(large) - 1) :]
    return [
        BatchPlan(workers=workers, micro_batch_size=rows, accumulation=rows_per_group // rows, sequence_parallel=size)
        for rows in sizes
    ]


def _no_solution(total: int, workers: int, size: int, micro: int | None, accumulation: int | None) -> str:
    groups = workers // size
    factors = [f"{groups} groups of {size} workers" if size > 1 else f"{workers} worker{'s' * (workers != 1)}"]
    factors += [f"per_device_train_batch_size {micro}"] if micro else []
    factors += [f"gradient_accumulation_steps {accumulation}"] if accumulation else []
    unit = groups * (micro or 1) * (accumulation or 1)
    if micro and accumulation:
        advice = f"Set it to {unit}, or leave one of the two others out."
    else:
        below = total // unit * unit
        nearest = " or ".join(str(rows) for rows in (below, below + unit) if rows)
        advice = f"The nearest that are possible: {nearest}"
        own = (micro or 1) * (accumulation or 1)
        advice += f"; or set cluster.workers to a divisor of {total // own * size}." if total % own == 0 else "."
    return (
        f"training.global_batch_size {total} cannot be divided: {' x '.join(factors)} = {unit} rows"
        f"{'' if micro and accumulation else ', times a whole number,'} must make {total}. {advice}"
    )
