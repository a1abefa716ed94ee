"""Claims about the `sweep` section: how it is read, what lies below it, and what is refused with its place."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import raytune
from raytune.cli import cli
from raytune.config.load import ConfigError, as_one_run, config_from, config_with, dump_yaml, load_config, load_with_places
from raytune.config.reading.keys import keys, type_at, unions
from raytune.config.sections.sweep import AshaStopping, MedianStopping
from raytune.errors import UserError

ROOT = Path(__file__).parents[2]
RUN = """\
name: base
data: {validation: demo:validation}
adapter: {method: qlora, rank: 8, quantization: int8}
training: {seed: 1}
"""


def written(folder: Path, text: str, name: str = "sweep.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def problems_of(text: str, folder: Path, overrides: tuple[str, ...] = ()) -> list[tuple[str, str, str, str]]:
    """(file:line:column without the folder, key, id, message) of every problem."""
    with pytest.raises(ConfigError) as caught:
        load_config([written(folder, text)], overrides)
    return [
        (str(problem.place).removeprefix(f"{folder}/"), problem.key, problem.id, problem.message)
        for problem in caught.value.problems
    ]


def space(*lines: str, rest: str = "") -> str:
    """A sweep file; the first line of the space is line 4."""
    return "\n".join(["data: {validation: demo:validation}", "sweep:", "  space:", *(f"    {line}" for line in lines), rest])


# --- every config that ships


CATALOGUE = ROOT / "configs" / "hardware"  # tables of GPUs and prices, no configs; test_plan_hardware.py reads them
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent != CATALOGUE)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_checks_where_its_rows_are(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And its base, where it is to be trained on this very machine."""
    config = load_config([path])
    base = config.model.base if config.cluster.instance else "demo"
    for source in (each for each in config.data.train if not each.path.startswith("demo:")):
        rows = (f'{{"prompt": "question {row}", "completion": "answer"}}\n' for row in range(20))
        (tmp_path / source.path).write_text("".join(rows))
    monkeypatch.chdir(tmp_path)
    sources = {f"data.{kind}.{n}": each for kind in ("train", "validation") for n, each in enumerate(getattr(config.data, kind))}
    few = [f"{key}={{path: '{each.path}', max_rows: 20}}" for key, each in sources.items() if each.path.startswith("demo:")]
    done = CliRunner().invoke(cli, ["check", str(path), f"model.base={base}", *few, "--json"])
    assert done.exit_code == 0, done.output
    assert (json.loads(done.stdout)["config"]["sweep"] is not None) == (path.parent.name == "sweeps")


# --- the run below a sweep


def test_a_sweep_is_laid_over_the_run_that_it_names_relative_to_itself(tmp_path: Path, monkeypatch):
    written(tmp_path, RUN, "runs/base.yaml")
    path = written(
        tmp_path,
        "name: s\nadapter: {method: lora}\nsweep: {run: ../runs/base.yaml, space: {training.seed: [1, 2]}}\n",
        "sweeps/sweep.yaml",
    )
    monkeypatch.chdir("/")
    config = load_config([path])
    assert (config.name, config.training.seed, config.data.validation[0].path) == ("s", 1, "demo:validation")
    assert config.adapter.model_dump(exclude_defaults=True) == {"rank": 8}
    assert config.sweep is not None
    assert config.sweep.run is None
    assert config_from(config) == config == load_config([written(tmp_path, dump_yaml(config), "whole.yaml")])


def test_runs_may_stand_on_runs_and_overrides_on_all_of_them(tmp_path: Path):
    written(tmp_path, RUN, "base.yaml")
    written(tmp_path, "name: middle\nsweep: {run: base.yaml}\ntraining: {seed: 2, max_steps: 5}\n", "middle.yaml")
    path = written(tmp_path, "name: top\nsweep: {run: middle.yaml, space: {adapter.rank: [2]}}\ntraining: {max_steps: 7}\n")
    config = load_config([path], ["data.validation.0.max_rows=3", "training.logging_steps=9"])
    assert (config.training.seed, config.training.max_steps, config.training.logging_steps) == (2, 7, 9)
    assert (config.data.validation[0].path, config.data.validation[0].max_rows) == ("demo:validation", 3)
    assert load_config([path], ["sweep=null"]).training.seed == 2


def test_a_file_below_itself_is_refused(tmp_path: Path):
    written(tmp_path, "sweep: {run: sweep.yaml}\n", "base.yaml")
    (problem,) = problems_of("name: a\nsweep: {run: ./base.yaml, space: {training.seed: [1]}}\n", tmp_path)
    assert problem[1:3] == ("sweep.run", "E105")
    assert problem[0] == "./base.yaml:1:14"
    assert "laid over itself" in problem[3]


def test_problems_of_both_files_are_reported_with_their_own_places(tmp_path: Path):
    written(tmp_path, "name: base\ntraining:\n  lr: 1\n", "base.yaml")
    found = problems_of("name: a\nsweep:\n  run: base.yaml\n  trials: 0\n  space: {adapter.rank: [0]}\n", tmp_path)
    assert [problem[:3] for problem in found] == [
        ("sweep.yaml:4:11", "sweep.trials", "E104"),
        ("sweep.yaml:5:26", "sweep.space.adapter.rank.0", "E104"),
        ("base.yaml:3:3", "training.lr", "E101"),
    ]


@pytest.mark.parametrize(
    ("run", "id", "words"),
    [("bas.yaml", "E107", 'Did you mean "'), (".", "E107", "a folder"), ("base.yaml", "E105", "name: base-sweep")],
)
def test_a_run_that_cannot_lie_below_is_refused_where_it_is_named(run: str, id: str, words: str, tmp_path: Path):
    written(tmp_path, "name: base\ndata: {validation: demo:validation}\n", "base.yaml")
    (problem,) = problems_of(f"sweep:\n  run: {run}\n  space: {{training.seed: [1]}}\n", tmp_path)
    assert problem[:3] == ("sweep.yaml:2:8", "sweep.run", id)
    assert words in problem[3]


def test_a_sweep_is_no_run_and_says_which_verb_it_wants(tmp_path: Path):
    path = written(tmp_path, space("training.seed: [1, 2]"))
    for verb in ("train", "plan"):
        done = CliRunner().invoke(cli, [verb, str(path)])
        assert done.exit_code == 2
        assert "raytune sweep" in done.output
    with pytest.raises(UserError, match="raytune sweep"):
        raytune.train(path)
    assert as_one_run(load_config([path], ["sweep=null"])).sweep is None


# --- overlays and overrides


def test_overrides_reach_into_the_space_by_whole_keys(tmp_path: Path):
    path = written(tmp_path, space("adapter.dropout: {uniform: [0, 0.2], step: 0.1}", "adapter.rank: [4, 8]"))
    config = load_config(
        [path],
        ["sweep.space.adapter.rank=[2, 3]", "sweep.space.adapter.dropout.step=0.05", "sweep.space.training.seed.integer=[1, 5]"],
    )
    assert config.sweep is not None
    assert {key: value.model_dump(exclude_none=True) for key, value in config.sweep.space.items()} == {
        "adapter.dropout": {"uniform": [0, 0.2], "step": 0.05},
        "adapter.rank": {"choice": [2, 3]},
        "training.seed": {"integer": [1, 5]},
    }


def test_another_kind_of_dimension_replaces_the_old_one(tmp_path: Path):
    path = written(tmp_path, space("adapter.dropout: {uniform: [0, 0.2], step: 0.1}"))
    sweep = load_config([path], ["sweep.space.adapter.dropout.choice=[0.1]"]).sweep
    assert sweep is not None
    assert sweep.space["adapter.dropout"].model_dump(exclude_none=True) == {"choice": [0.1]}


def test_another_stopping_method_drops_only_the_keys_it_does_not_have(tmp_path: Path):
    path = written(tmp_path, space("training.seed: [1]", rest="  stopping: {grace: 7, reduction_factor: 4}"))
    for override, expected in (
        ("sweep.stopping.unit=tokens", AshaStopping(unit="tokens", grace=7, reduction_factor=4)),
        ("sweep.stopping.method=median", MedianStopping(method="median", grace=7)),
    ):
        sweep = load_config([path], [override]).sweep
        assert sweep is not None
        assert sweep.stopping == expected


def test_unions_are_found_wherever_they_are():
    assert unions() == {"adapter": "lora", "sweep.stopping": "asha"}
    assert keys()["sweep.stopping.reduction_factor"].methods == ("asha", "hyperband")
    assert keys()["sweep.stopping.grace"].union == "sweep.stopping"
    assert type_at(("sweep", "space", "adapter.rank", "integer", 0)) is int


# --- what is refused


REFUSED = {
    "unknown key": (space("adapter.rnk: [1]"), "4:5", "sweep.space.adapter.rnk", "E101", 'Did you mean "adapter.rank"?'),
    "foreign key": (space("lr: [1]"), "4:5", "sweep.space.lr", "E101", 'Did you mean "training.learning_rate"?'),
    "section": (space("training: [1]"), "4:5", "sweep.space.training", "E104", "is a section; name one of its keys"),
    "name": (space("name: [a]"), "4:5", "sweep.space.name", "E101", "the same for all trials"),
    "address": (space("cluster.address: [a]"), "4:5", "sweep.space.cluster.address", "E101", "the same for all trials"),
    "itself": (space("sweep.trials: [1]"), "4:5", "sweep.space.sweep.trials", "E101", "sweep is the same for all trials"),
    "plain value": (
        space("adapter.rank: 8"),
        "4:19",
        "sweep.space.adapter.rank",
        "E104",
        "must be a list of values, an expression",
    ),
    "nothing": (space("adapter.rank:"), "4:18", "sweep.space.adapter.rank", "E104", "got nothing"),
    "no options": (space("adapter.rank: []"), "4:19", "sweep.space.adapter.rank", "E104", "got []"),
    "wrong option": (space("adapter.rank: [8, a]"), "4:23", "sweep.space.adapter.rank.1", "E104", 'an integer >= 1, got "a"'),
    "near word": (space("training.optimizer: [adamv]"), "4:26", "training.optimizer.0", "E104", '"adamw"'),
    "wrong end": (space("adapter.rank: {integer: [0, 8]}"), "4:30", "sweep.space.adapter.rank.0", "E104", "got 0"),
    "text end": (space("training.learning_rate: {uniform: [0, high]}"), "4:43", "uniform.1", "E104", 'a number, got "high"'),
    "fractions of an integer": (
        space("adapter.rank: {uniform: [1, 8]}"),
        "4:30",
        "rank.0",
        "E104",
        "draw it with integer or log_integer",
    ),
    "one end": (space("adapter.alpha: {uniform: [1]}"), "4:30", "adapter.alpha.uniform", "E104", "two numbers [low, high]"),
    "reversed": (space("adapter.alpha: {uniform: [2, 1]}"), "4:5", "adapter.alpha", "E105", "goes from low to high, got [2, 1]"),
    "log of nothing": (space("adapter.dropout: {log_uniform: [0, 1]}"), "4:5", "adapter.dropout", "E105", "above 0, got 0"),
    "two kinds": (space("adapter.rank: {choice: [1], grid: [2]}"), "4:5", "adapter.rank", "E105", "got choice and grid"),
    "no kind": (space("adapter.rank: {when: true == true}"), "4:5", "adapter.rank", "E105", "got none of them"),
    "step of a choice": (space("adapter.rank: {choice: [1], step: 2}"), "4:5", "adapter.rank", "E105", "step goes with uniform"),
    "half step": (space("adapter.rank: {integer: [1, 8], step: 0.5}"), "4:5", "adapter.rank", "E105", "must be an integer"),
    "wide step": (space("adapter.alpha: {uniform: [1, 8], step: 9}"), "4:5", "adapter.alpha", "E105", "wider than the range"),
    "Ray's spelling": (space("adapter.alpha: {loguniform: [1, 8]}"), "4:21", "adapter.alpha.loguniform", "E101", '"log_uniform"'),
    "Ray's integers": (space("adapter.rank: {randint: [1, 8]}"), "4:20", "adapter.rank.randint", "E101", '"sweep.space.integer"'),
    "no expression": (space("adapter.alpha: 2 *"), "4:20", "adapter.alpha", "E104", '"2 *" is no expression'),
    "call": (space("adapter.alpha: open('x')"), "4:20", "adapter.alpha", "E104", "is not allowed"),
    "unknown name": (space("adapter.alpha: 2 * adapter.rnk"), "4:20", "adapter.alpha", "E101", 'Did you mean "adapter.rank"?'),
    "bare word": (
        space("training.warmup_ratio: auto"),
        "4:28",
        "warmup_ratio",
        "E101",
        "text needs quotes inside an expression: 'auto'",
    ),
    "condition": (
        space("adapter.rank: {choice: [1], when: rank > 3}"),
        "4:39",
        "adapter.rank",
        "E101",
        'Did you mean "adapter.rank"?',
    ),
    "circle": (
        space("adapter.alpha: 2 * adapter.rank", "adapter.rank: {choice: [1], when: adapter.alpha > 1}"),
        "4:5",
        "adapter.alpha",
        "E105",
        "depends on itself: adapter.alpha -> adapter.rank -> adapter.alpha",
    ),
    "part of a drawn key": (
        space("data.train: [a]", "data.train.0.path: [b]"),
        "5:5",
        "data.train.0.path",
        "E105",
        "lies in data.train",
    ),
    "optuna with a grid": (
        space("adapter.rank: {grid: [1, 2]}", rest="  search: optuna"),
        "2:1",
        "sweep",
        "E105",
        "make adapter.rank a choice",
    ),
    "optuna with hyperband": (
        space("adapter.rank: [1, 2]", rest="  search: optuna\n  stopping: {method: hyperband}"),
        "2:1",
        "sweep",
        "E105",
        "optuna would learn nothing; use asha",
    ),
    "metric of training": (
        space("adapter.rank: [1, 2]", rest="  metric: train/loss"),
        "5:11",
        "sweep.metric",
        "E105",
        'validation rows (validation/loss, ...), or on suites (evaluation.while_training), got "train/loss"',
    ),
    "provider": (space("provider.region: [a]"), "4:5", "sweep.space.provider.region", "E101", "the same for all trials"),
    "unknown first": (
        space("adapter.rank: [1]", rest="  first: [{adapter.rnk: 1}]"),
        "5:12",
        "first.0.adapter.rnk",
        "E101",
        '"adapter.rank"',
    ),
    "first outside": (
        space("adapter.rank: [1]", rest="  first: [{adapter.rank: 2}]"),
        "5:26",
        "first.0.adapter.rank",
        "E104",
        "got 2",
    ),
    "first off the grid": (
        space("adapter.dropout: {uniform: [0, 0.2], step: 0.05}", rest="  first: [{adapter.dropout: 0.07}]"),
        "5:29",
        "first.0.adapter.dropout",
        "E104",
        "in steps of 0.05",
    ),
    "derived first": (
        space("adapter.alpha: 2 * 3", rest="  first: [{adapter.alpha: 2}]"),
        "5:12",
        "adapter.alpha",
        "E104",
        "leave it out",
    ),
    "pbt": (
        space("adapter.rank: [1]", rest="  stopping: {method: pbt}"),
        "5:22",
        "stopping.method",
        "E104",
        "trials do not share theirs",
    ),
    "pbt as text": (space("adapter.rank: [1]", rest="  stopping: pbt"), "5:13", "stopping", "E104", "copies checkpoints"),
    "asha as text": (space("adapter.rank: [1]", rest="  stopping: asha"), "5:13", "stopping", "E104", '"method: asha"'),
    "Ray's median": (
        space("adapter.rank: [1]", rest="  stopping: {method: median_stopping}"),
        "5:22",
        "stopping.method",
        "E104",
        '"median"',
    ),
    "key of another method": (
        space("adapter.rank: [1]", rest="  stopping: {method: none, grace: 1}"),
        "5:28",
        "stopping.grace",
        "E101",
        "unknown key for method none",
    ),
    "Ray's grace": (
        space("adapter.rank: [1]", rest="  stopping: {grace_period: 1}"),
        "5:14",
        "grace_period",
        "E101",
        '"sweep.stopping.grace"',
    ),
    "Ray's samples": (space("adapter.rank: [1]", rest="  num_samples: 1"), "5:3", "sweep.num_samples", "E101", '"sweep.trials"'),
    "Ray's scheduler": (
        space("adapter.rank: [1]", rest="  scheduler: a"),
        "5:3",
        "sweep.scheduler",
        "E101",
        '"sweep.stopping.method"',
    ),
    "Ray's space": ("sweep:\n  param_space: {}\n", "2:3", "sweep.param_space", "E101", '"sweep.space"'),
    "no space": ("sweep:\n  trials: 3\n", "1:1", "sweep.space", "E103", "a mapping of config keys"),
    "empty space": ("sweep:\n  space: {}\n", "2:10", "sweep.space", "E104", "a mapping of config keys"),
    "nothing measured": (
        "sweep:\n  metric: validation/loss\n  space: {training.seed: [1]}\n",
        "2:11",
        "sweep.metric",
        "E105",
        "no validation",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_wrong_sweep_is_refused_with_place_key_and_reason(case, tmp_path: Path):
    text, place, key, id, words = case
    found = problems_of(text, tmp_path)
    assert any(
        problem[0].endswith(f"yaml:{place}") and problem[1].endswith(key) and problem[2] == id and words in problem[3]
        for problem in found
    ), found


def test_one_wrong_dimension_does_not_hide_the_others(tmp_path: Path):
    text = space(
        "adapter.rank: [0, 8]",
        "adapter.alpha: adapter.rnk - 4",
        "training.learning_rate: {uniform: [0, high]}",
        "training: [1]",
        "training.seed: 3",
        rest="  trials: none",
    )
    places = [problem[0].rpartition("yaml:")[2] for problem in problems_of(text, tmp_path)]
    assert places == ["4:20", "5:20", "6:43", "7:5", "8:20", "9:11"]


@pytest.mark.parametrize(
    "dimension",
    [
        "adapter.rank: [4, 8]",
        "adapter.rank: {log_integer: [4, 64]}",
        "adapter.method: [full, lora]",
        "adapter.target_modules: [attention, [q_proj]]",
        "adapter.lora_plus_ratio: [null, 16]",
        "adapter.rank_pattern.q_proj: [4, 8]",
        "checkpoint.every: [15m, 900]",
        "data.train: [demo:train, {path: demo:train, max_rows: 3}, [demo:train]]",
        "data.train.0.max_rows: {integer: [8, 64]}",
        "training.zero.stage: [0, 1, auto]",
        "training.zero.overrides.a.b: [1, x]",
        "training.learning_rate: [auto, 1e-3]",
        "adapter.alpha: 2 * adapter.rank_pattern.q_proj",
    ],
)
def test_keys_of_any_kind_can_be_searched_over(dimension: str, tmp_path: Path):
    load_config([written(tmp_path, space(dimension))])


def test_places_of_all_keys_come_with_a_loaded_config(tmp_path: Path):
    path = written(tmp_path, space("adapter.rank: [4, 8]"))
    _, places = load_with_places([path])
    assert str(places["sweep.space.adapter.rank"]) == f"{path}:4:5"


def test_values_laid_over_a_config_follow_the_rules_of_overlays():
    base = config_from({"adapter": {"method": "qlora", "rank": 8, "quantization": "int8"}})
    assert config_with(base, {"adapter.alpha": 4, "adapter.method": "lora"}) == config_from(
        {"adapter": {"method": "lora", "rank": 8, "alpha": 4}}
    )
    with pytest.raises(ConfigError) as caught:
        config_with(base, {"adapter.rank": 0, "data.train.7.path": "x", "adapter.method": "full"})
    assert [(problem.key, problem.id) for problem in caught.value.problems] == [
        ("data.train.7.path", "E109"),
        ("adapter.rank", "E101"),
    ]
