"""Claims about where an error of the plan, the data or the model was caused: the line of the key, found in one place."""

import pickle
from pathlib import Path

import pytest

import raytune
from raytune.config.load import load_with_places
from raytune.config.words.places import errors_at
from raytune.errors import ClusterError, DataError, ModelError, PlanError, UserError

TEXT = """\
model: {base: ./base}
data:
  train: [a.jsonl, b/c.jsonl]
  max_length: 512
training:
  compile: true
  zero:
    stage: 3
cluster: {workers: 2}
evaluation: {generation: {rows: questions.jsonl}}
"""


def placed(error: UserError, folder: Path, text: str = TEXT) -> str:
    """Where an error says that it was caused, without the name of the file."""
    path = folder / "run.yaml"
    path.write_text(text)
    config, places = load_with_places([path])
    with pytest.raises(type(error)) as caught, errors_at(config, places):
        raise error
    assert str(caught.value).endswith(str(error.args[0]))
    return caught.value.place.removeprefix(f"{path}:")


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (UserError("data.max_length is 512, but m has 64 positions. Set data.max_length to 64 or less."), "4:3  data.max_length"),
        (PlanError("training.precision is fp16, training.compile is true. Change one."), "6:3  training.compile"),
        (PlanError("training.zero.stage is 3, which cluster.workers 2 has no use for."), "8:5  training.zero.stage"),
        (PlanError("The run does not fit.", keys=("cluster.workers",)), "9:11  cluster.workers"),
        (PlanError("Raise training.compile.", keys=("cluster.gpus_per_worker", "cluster.workers")), "9:11  cluster.workers"),
        (DataError("1 row cannot be used:\n  b/c.jsonl:3: not JSON", keys=("data.train.1",)), "3:20  data.train.1"),
        (DataError("a.jsonl is empty (0 bytes)."), "3:3  data.train"),
        (DataError("There is no file 'questions.jsonl' on a host."), "10:27  evaluation.generation.rows"),
        (ModelError("The folder ./base has no config.json."), "1:9  model.base"),
        (UserError("nothing that anybody wrote"), ""),
        (UserError("adapter.rank is 16, which is odd"), ""),
        (UserError("The file data.train.jsonl and my.own.words are no keys."), ""),
    ],
)
def test_an_error_is_placed_at_the_key_that_caused_it(error: UserError, place: str, tmp_path: Path):
    assert placed(error, tmp_path) == place


def test_what_a_sweep_varies_is_blamed_where_it_is_drawn(tmp_path: Path):
    text = "data: {train: a.jsonl, validation_fraction: 0.1}\nsweep:\n  space:\n    adapter.rank: [1, 2]\n"
    assert placed(PlanError("adapter.rank is 1, which is odd"), tmp_path, text) == "4:5  sweep.space.adapter.rank"
    assert placed(UserError("This is a sweep.", keys=("sweep",)), tmp_path, text) == "2:1  sweep"


def test_a_place_survives_the_way_between_processes():
    error = PlanError("training.compile is true", keys=("training.compile",))
    error.place = "run.yaml:1:1  training.compile"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.keys) == ("run.yaml:1:1  training.compile\ntraining.compile is true", ("training.compile",))


def test_errors_that_no_key_caused_are_left_alone(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    with pytest.raises(ClusterError, match=r"^cluster\.workers are lost$"), errors_at(*load_with_places([path])):
        raise ClusterError("cluster.workers are lost")


def test_the_python_interface_says_the_place_too(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{base: demo}}\nstorage: {tmp_path}\ndata:\n  max_length: 100000\n")
    with pytest.raises(UserError, match=rf"^{path}:4:3  data\.max_length\ndata\.max_length is 100000, but demo"):
        raytune.train(path, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["run.yaml"]
