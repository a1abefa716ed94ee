"""The image has the versions that pyproject.toml asks for, and the kernels that DeepSpeed would else build during a run."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from raytune.plan.costs.hardware import load_catalogue

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "cluster" / "image"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"] + EXTRAS["s3"] + EXTRAS["serve"] + EXTRAS["gpu"]]
PINNED = dict(line.split("==") for line in (IMAGE / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
DOCKERFILE = (IMAGE / "Dockerfile").read_text()


@pytest.mark.parametrize("dependency", DEPENDENCIES, ids=lambda dependency: dependency.name)
def test_the_image_pins_a_version_that_the_project_allows(dependency: Requirement) -> None:
    assert dependency.specifier.contains(PINNED[dependency.name])


def test_the_image_pins_nothing_that_the_project_does_not_use() -> None:
    in_cluster_files = {"boto3"}  # Ray's autoscaler on AWS
    assert set(PINNED) == {dependency.name for dependency in DEPENDENCIES} | in_cluster_files


def test_every_installation_in_the_image_is_bound_by_the_pins() -> None:
    assert "PIP_CONSTRAINT=/src/cluster/image/constraints.txt" in DOCKERFILE
    first = DOCKERFILE.index("PIP_CONSTRAINT")
    assert all(match.start() > first for match in re.finditer("pip install", DOCKERFILE))


def test_the_kernels_are_asked_for_by_names_that_deepspeed_knows() -> None:
    from deepspeed.ops import op_builder

    sources = "".join(path.read_text() for path in Path(op_builder.__path__[0]).glob("*.py"))
    known = set(re.findall(r"BUILD_VAR = [\"'](DS_BUILD_\w+)[\"']", sources)) | {"DS_BUILD_CPU_ADAM"}
    asked = set(re.findall(r"(DS_BUILD_\w+)=1", DOCKERFILE))
    assert {"DS_BUILD_FUSED_ADAM", "DS_BUILD_CPU_ADAM", "DS_BUILD_AIO"} <= asked <= known


CAPABILITIES = {"A100": "8.0", "A10G": "8.6", "L4": "8.9", "L40S": "8.9", "H100": "9.0", "H200": "9.0"}


def test_the_kernels_are_built_for_every_gpu_of_the_catalogue_but_those_without_flash_attention() -> None:
    (built,) = re.findall(r'TORCH_CUDA_ARCH_LIST="([^"]+)"', DOCKERFILE)
    gpus = {gpu.name.partition("-")[0] for gpu in load_catalogue().gpus.values() if gpu.supports_flash}
    assert {CAPABILITIES[gpu] for gpu in gpus} <= set(built.split(";"))


def test_nothing_is_piped_from_the_network_into_a_shell() -> None:
    for path in [*(ROOT / "cluster").rglob("*.j2"), *(ROOT / "cluster").rglob("*.sh"), IMAGE / "Dockerfile"]:
        assert not re.search(r"(curl|wget)[^\n]*\|\s*(sudo )?(ba)?sh", path.read_text()), path


LINKED = {
    # What NCCL opens by name for InfiniBand and RoCE, and what reads its drivers' names.
    "libibverbs.so.1": "libibverbs1",
    "libmlx5.so.1": "ibverbs-providers",
    # Of NCCL's plug-in for EFA (hwloc, libfabric), of libfabric (providers efa, verbs and shared memory), and of theirs.
    "libhwloc.so.15": "libhwloc15",
    "libefa.so.1": "ibverbs-providers",
    "librdmacm.so.1": "librdmacm1t64",
    "libnuma.so.1": "libnuma1",
    "libatomic.so.1": "libatomic1",
    "libudev.so.1": "libudev1",
    "libnl-3.so.200": "libnl-3-200",
    "libnl-route-3.so.200": "libnl-route-3-200",
}
"""Libraries by their names to the loader, and Ubuntu 24.04's package of each; read off Debian's packages of the same names with
readelf, where nothing else was left over but libc."""


def test_the_image_has_every_library_that_the_fast_networks_link_to() -> None:
    final = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    installed = set(re.findall(r"[a-z0-9.+-]+", " ".join(re.findall(r"apt-get install([^&]*)&&", final))))
    assert set(LINKED.values()) | {"rdma-core"} <= installed


def test_what_is_fetched_for_efa_is_checked_before_it_runs() -> None:
    fetched, checked, run = (DOCKERFILE.index(words) for words in ("curl -fsSLo", "sha256sum -c", "./efa_installer.sh"))
    assert fetched < checked < run
