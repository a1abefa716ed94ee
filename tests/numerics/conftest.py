"""What the parity tests train: one tiny base model and one small store, made once; a bucket for rows; where ranks come from."""

from collections.abc import Iterator

import pytest

from tests.numerics.processes import prepare_ranks
from tests.numerics.runs import Material, make_material
from tests.s3_stand_in import bucket


@pytest.hookimpl(trylast=True)  # when what is imported was taken from the garbage collector
def pytest_collection_finish() -> None:
    prepare_ranks()


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("numerics"))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with bucket() as url:
        yield url
