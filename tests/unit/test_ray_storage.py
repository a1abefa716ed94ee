"""Ray's own files lie beside a run's, whatever kind of storage that is."""

import pickle
import uuid
from pathlib import Path

import pytest
from pyarrow.fs import FileSystem
from ray.train.v2._internal.execution.storage import StorageContext

from raytune import storage
from raytune.errors import UserError
from raytune.launch.cluster.ray_storage import ray_storage


@pytest.mark.parametrize("kind", ["local", "s3", "s3a", "memory"])
def test_ray_finds_its_folder_where_we_do(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    roots = {"local": str(tmp_path), "memory": "memory://runs"}
    root = roots.get(kind) or request.getfixturevalue("s3").replace("s3:", f"{kind}:")
    folder = f"{root}/{uuid.uuid4().hex}/ray"
    context = StorageContext(**ray_storage(folder), experiment_dir_name="attempt-1")
    context._check_validation_file()  # as every worker does
    assert "attempt-1/.validate_storage_marker" in storage.file_sizes(folder)


def test_its_client_travels_to_workers() -> None:
    client = ray_storage("memory://runs/ray")["storage_filesystem"]
    assert isinstance(client, FileSystem)
    assert pickle.loads(pickle.dumps(client)).equals(client)


def test_an_unknown_kind_of_storage_is_refused() -> None:
    with pytest.raises(UserError, match="Use a local folder or one of s3://"):
        ray_storage("s4://runs/ray")
