"""What the parity tests train: one tiny base model and one small store, made once."""

import pytest

from tests.numerics.runs import Material, make_material


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("numerics"))
