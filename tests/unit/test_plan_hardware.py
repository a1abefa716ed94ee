"""The hardware catalogue: complete entries, known GPUs, and a good answer to a name that is not in it."""

import re
from pathlib import Path

import pytest

from raytune.errors import UserError
from raytune.plan.costs.hardware import HARDWARE, load_catalogue

CATALOGUE = load_catalogue()
REQUIRED = (
    "p4d.24xlarge p4de.24xlarge p5.48xlarge p5e.48xlarge p5en.48xlarge g5.xlarge g6e.xlarge a2-highgpu-8g a2-ultragpu-8g "
    "a3-highgpu-8g a3-megagpu-8g Standard_ND96asr_v4 Standard_ND96amsr_A100_v4 Standard_ND96isr_H100_v5"
)


def test_every_entry_says_where_it_is_from_and_of_which_date() -> None:
    for entry in (*CATALOGUE.gpus.values(), *CATALOGUE.instances.values()):
        assert len(entry.source) > 10, entry.name
        assert re.fullmatch(r"20\d\d-[01]\d-[0-3]\d", entry.date), entry.name


def test_every_instance_has_a_gpu_that_is_listed() -> None:
    assert all(CATALOGUE.gpu_of(instance).memory_bytes > 10 * 2**30 for instance in CATALOGUE.instances.values())


@pytest.mark.parametrize("name", REQUIRED.split())
def test_the_clouds_that_people_train_on_are_listed(name: str) -> None:
    instance = CATALOGUE.instance(name)
    assert instance.usd_per_hour > 0
    assert instance.regions


def test_rates_are_of_the_right_magnitude() -> None:
    """A slip of a factor of eight (bits for bytes) or of a thousand would leave these bounds."""
    for gpu in CATALOGUE.gpus.values():
        assert 3e11 <= gpu.memory_bytes_per_s <= 1e13
        assert 5e13 <= gpu.bf16_flops <= 3e15
        assert 1e10 <= gpu.host_bytes_per_s <= 1e11
    for instance in CATALOGUE.instances.values():
        assert 1e9 <= instance.inter_bytes_per_s <= 400e9
        assert 2e10 <= instance.intra_bytes_per_s <= 1e12
        assert 0.5 <= (instance.usd_per_hour or 10) / instance.num_gpus <= 15
        assert instance.spot_usd_per_hour is None or instance.spot_usd_per_hour < instance.usd_per_hour


def test_a_mistyped_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'p5\.48xlage' is not in the hardware catalogue .* Did you mean p5\.48xlarge or"):
        CATALOGUE.instance("p5.48xlage")
    with pytest.raises(UserError, match=r"Did you mean .*H100-80GB-SXM"):
        CATALOGUE.gpu("h100-80gb")
    with pytest.raises(UserError, match=r"It knows p4d\.24xlarge, "):
        CATALOGUE.instance("@@@")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("source: ", "origin: "), r"entry 'A100-40GB-SXM': (source: Field required|origin: Unexpected keyword)"),
        (("80GB-SXM", "40GB-SXM"), r"'A100-40GB-SXM' is listed twice"),
        (("name: L4-24GB", "name: L4"), r"g6\.xlarge has a GPU of kind 'L4-24GB' is not in the hardware catalogue"),
        (("0.83", "1.83"), r"entry 'A100-40GB-SXM': practical_share: Input should be less than or equal to 1"),
    ],
)
def test_an_incomplete_entry_is_named(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    (tmp_path / "gpus.yaml").write_text((HARDWARE / "gpus.yaml").read_text().replace(*change))
    (tmp_path / "instances.yaml").write_text((HARDWARE / "instances.yaml").read_text())
    with pytest.raises(UserError, match=message):
        load_catalogue(tmp_path)
