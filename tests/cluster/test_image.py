"""The image has the versions that pyproject.toml asks for, and the kernels that DeepSpeed would else build during a run."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from raytune.plan.hardware import load_catalogue

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "cluster" / "image"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["s3"]]
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
