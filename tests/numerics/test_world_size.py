"""The loss curve of a run does not depend on how its global batch is divided."""

import pytest

from tests.numerics.runs import LORA, SAME_SUMS, Change, Material, largest_difference, make_plan, relative_difference, run, train
from tests.variants import variants

# 40 documents in about 20 rows: the last of the 6 steps has 4 rows that count and 4 that are beyond the end of the run.
BEYOND_THE_END = Change(num_rows_in_run=44)


@pytest.mark.parametrize(
    ("workers", "accumulation", "stage"),
    variants([(1, 8, 0), (4, 2, 3)], [(2, 2, 2), (4, 1, 0)]),
    ids=lambda value: str(value),
)
def test_workers_micro_batch_and_accumulation_change_no_loss(
    workers: int, accumulation: int, stage: int, material: Material
) -> None:
    whole = train(make_plan(material, accumulation=1, adapter=LORA), BEYOND_THE_END)
    divided = run(make_plan(material, workers=workers, accumulation=accumulation, stage=stage, adapter=LORA), BEYOND_THE_END)
    assert relative_difference(divided[0].losses, whole.losses) <= SAME_SUMS
    assert largest_difference(divided[0], whole) <= SAME_SUMS
    assert all(outcome.numbers == divided[0].numbers for outcome in divided)
