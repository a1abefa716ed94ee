"""What the parity tests train: one tiny base model and one small store, made once; and a bucket for rows."""

from collections.abc import Iterator

import pytest

from tests.numerics.runs import Material, make_material
from tests.s3_stand_in import bucket


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("numerics"))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with bucket() as url:
        yield url
