"""How often an epoch has the rows of each source and how much they count: as asked, the same always, and told."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.config.data import DataSource
from raytune.config.load import config_from, load_with_places
from raytune.config.metric_names import measured
from raytune.config.places import errors_at
from raytune.config.row_sources import trained_sources
from raytune.data.mixing import documents_of_passes, first_part
from raytune.data.store import WEIGHTS_COLUMN, Store
from raytune.errors import UserError
from raytune.launch.run import plan_run
from raytune.plan.ahead import assumed_data
from raytune.plan.describe import plan_text
from raytune.plan.identity import differences, identity_of
from raytune.plan.mixing import EACH_ROW_ONCE, Mixture, mixture_of, passes_of_epoch
from raytune.plan.run_plan import RunPlan
from raytune.plan.settings import key_of
from raytune.storage import file_digest
from tests.tiny import PATIENT, tiny_rows, tiny_store

# --- How often


def passes(mixture: Mixture, num_targets: Sequence[int]) -> list[float]:
    return passes_of_epoch(mixture, num_targets, [f"source {index}" for index in range(len(num_targets))])


SIZES = st.lists(st.integers(50, 5000), min_size=1, max_size=5)


@given(SIZES)
def test_without_a_wish_and_at_temperature_1_each_row_is_seen_once(sizes: list[int]) -> None:
    assert passes(EACH_ROW_ONCE, sizes) == [1.0] * len(sizes)
    assert passes(Mixture(temperature=1.0, until="first_exhausted"), sizes) == [1.0] * len(sizes)


@given(st.lists(st.tuples(st.integers(50, 5000), st.floats(0.5, 4)), min_size=2, max_size=5), st.booleans())
def test_parts_are_those_that_were_asked_for(sources: list[tuple[int, float]], repeats: bool) -> None:
    sizes, parts = zip(*sources)
    found = passes(Mixture(proportions=parts, until="all_exhausted" if repeats else "first_exhausted"), sizes)
    seen = [times * size for times, size in zip(found, sizes)]
    assert [one / sum(seen) for one in seen] == pytest.approx([part / sum(parts) for part in parts])
    assert (min if repeats else max)(found) == 1, "exactly, so that nothing of this source is cut or seen twice"


@given(SIZES, st.floats(0.5, 50))
def test_temperature_gives_parts_of_n_to_1_over_t(sizes: list[int], temperature: float) -> None:
    seen = [times * size for times, size in zip(passes(Mixture(temperature=temperature), sizes), sizes)]
    parts = [size ** (1 / temperature) for size in sizes]
    assert [one / sum(seen) for one in seen] == pytest.approx([part / sum(parts) for part in parts])


@given(SIZES, SIZES, st.floats(0.01, 0.8))
def test_what_is_replayed_has_its_share_of_all_and_the_rest_is_as_without(
    sizes: list[int], others: list[int], share: float
) -> None:
    found = passes(Mixture(num_replayed=len(others), replay_share=share), [*sizes, *others])
    assert found[: len(sizes)] == [1.0] * len(sizes)
    replayed = sum(times * size for times, size in zip(found[len(sizes) :], others))
    assert replayed / (replayed + sum(sizes)) == pytest.approx(share)
    assert len(set(found[len(sizes) :])) == 1, "of several sources each as often"


@pytest.mark.parametrize(
    ("mixture", "sizes", "said", "key"),
    [
        (Mixture(proportions=(1, 1)), [10, 0], "source 1 has no targets", "data.train.1.proportion"),
        (Mixture(proportions=(5000, 1)), [10, 10], "pass over source 0 5k times", "data.train.0.proportion"),
        (Mixture(temperature=0.01), [10, 11, 1], "bring it nearer to 1", "data.mixing.temperature"),
        (Mixture(num_replayed=1, replay_share=0.5), [10, 0], "has no targets, so nothing", "strategy.replay.data"),
        (Mixture(num_replayed=1, replay_share=0.9), [10**6, 10], "Name more rows", "strategy.replay.share"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(mixture: Mixture, sizes: list[int], said: str, key: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        passes(mixture, sizes)
    assert caught.value.keys == (key,)


def test_a_source_without_targets_takes_no_part_in_a_temperature() -> None:
    assert passes(Mixture(temperature=2.0), [400, 0, 100]) == pytest.approx([1, 1, 2])


# --- Which documents


@PATIENT
@given(st.lists(st.tuples(st.floats(0, 4), st.lists(st.integers(1, 50), max_size=30)), min_size=1, max_size=4))
def test_each_pass_has_a_document_once_and_all_passes_what_was_asked_for(sources: list[tuple[float, list[int]]]) -> None:
    times, sizes = [one for one, _ in sources], [size for _, own in sources for size in own]
    source_of = np.array([index for index, (_, own) in enumerate(sources) for _ in own], np.int64)
    num_targets = np.array(sizes, np.int64)
    found = documents_of_passes(times, source_of, num_targets)
    seen = Counter(document for one in found for document in one.tolist())
    assert all(len(set(one.tolist())) == len(one) and (np.diff(one) > 0).all() for one in found)
    for index, (asked, own) in enumerate(sources):
        documents = np.flatnonzero(source_of == index).tolist()
        assert all(seen[one] in (int(asked), int(asked) + 1) for one in documents)
        targets = sum(seen[one] * sizes[one] for one in documents)
        assert abs(targets - asked * sum(own)) <= max(own, default=0) / 2 + 1e-6, "as near as whole documents come"


@given(st.lists(st.integers(1, 50), min_size=1, max_size=50), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_keeps_what_a_smaller_one_had(sizes: list[int], one: float, other: float) -> None:
    small, large = (set(first_part(np.array(sizes), share).tolist()) for share in sorted((one, other)))
    assert small <= large


# --- In a store


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for name, seed in (("small", 1), ("large", 2)):
        rows = tiny_rows({"small": 8, "large": 60}[name], seed)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def opened(files: Path, **changes: Any) -> Store:
    sources = tuple(DataSource(path=str(files / f"{name}.jsonl")) for name in ("small", "large"))
    return Store.open(tiny_store(files / "stores", sources=sources, **changes).path)


def times_seen(store: Store) -> dict[str, list[int]]:
    """How often each document of a file is in the rows, sorted."""
    seen = Counter(origin for row in range(store.num_rows) for origin in store.sources(row))
    files = {Path(file).stem: file for file in store.files}
    return {name: sorted(times for (file, _), times in seen.items() if file == path) for name, path in files.items()}


def test_a_store_holds_the_mixture_and_no_row_has_a_document_twice(files: Path) -> None:
    plain = opened(files)
    assert times_seen(plain) == {"small": [1] * 8, "large": [1] * 60}
    small, large = (source.targets for source in plain.report.sources)
    store = opened(files, mixture=Mixture(proportions=(1.0, 3.0)))
    seen = times_seen(store)
    assert set(seen["large"]) == {1}
    assert len(seen["large"]) == 60
    asked = large / 3 / small
    assert asked > 2
    assert set(seen["small"]) <= {int(asked), int(asked) + 1}
    assert all(len(set(store.sources(row))) == len(store.sources(row)) for row in range(store.num_rows))
    first, second = store.report.sources
    assert first.in_epoch.targets / (first.in_epoch.targets + second.in_epoch.targets) == pytest.approx(1 / 4, abs=0.01)
    assert (first.rows, first.documents, first.targets) == (8, 8, small)
    assert store.info.num_documents == sum(sum(times) for times in seen.values())
    assert store.info.num_targets == first.in_epoch.targets + second.in_epoch.targets == int(store.num_targets_of_row.sum())
    assert store.info.num_tokens == sum(len(store.row(row).input_ids) for row in range(store.num_rows))
    assert store.report.fill == pytest.approx(store.num_tokens / (store.num_rows * 512))


def test_until_the_first_is_exhausted_no_document_is_seen_twice(files: Path) -> None:
    seen = times_seen(opened(files, mixture=Mixture(proportions=(1.0, 1.0), until="first_exhausted")))
    assert seen["small"] == [1] * 8
    assert set(seen["large"]) == {1}
    assert 4 <= len(seen["large"]) <= 14


def test_weights_and_a_mixture_that_ask_for_nothing_change_no_byte(files: Path) -> None:
    plain = opened(files)
    asked = [
        opened(files, loss_weights=(1.0, 1.0)),
        opened(files, mixture=Mixture(temperature=1.0, until="first_exhausted")),
        opened(files, mixture=Mixture(replay_share=0.0)),
    ]
    digests = {file_digest(Path(store.info.path) / "rows.arrow").sha256 for store in (plain, *asked)}
    assert len(digests) == 1
    assert WEIGHTS_COLUMN not in plain._reader.schema.names


def test_each_target_has_the_weight_of_its_source_times_that_of_its_turn(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    weighed = [turns[0], turns[1] | {"weight": 3}]
    (tmp_path / "small.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in (turns, weighed)))
    (tmp_path / "large.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    store = opened(tmp_path, loss_weights=(0.25, 2.0), packing="none")
    found = {}
    for index in range(store.num_rows):
        row, (origin,) = store.row(index), store.sources(index)
        assert row.target_weights is not None
        found[Path(origin[0]).stem, origin[1]] = set(row.target_weights[row.is_target].tolist())
    assert found == {("small", 1): {0.25}, ("small", 2): {0.75}, ("large", 1): {2.0}}


def test_a_part_too_small_for_any_document_is_refused(files: Path) -> None:
    with pytest.raises(UserError, match=r"no document of .*large.jsonl: the smallest is larger than its part"):
        opened(files, mixture=Mixture(num_replayed=1, replay_share=1e-4))


# --- Asked and told


def written(tmp_path: Path, files: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text.replace("small", str(files / "small.jsonl")).replace("large", str(files / "large.jsonl")))
    return path


REFUSED = {
    "data:\n  train:\n  - {path: small, loss_weight: 0}\n  - large": (3, "must be a number > 0, got 0"),
    "data:\n  train:\n  - {path: small, proportion: -1}\n  - large": (3, "must be a number > 0"),
    "data:\n  train: [{path: small, proportion: 1}, large]": (2, "give each source a proportion, or none of them"),
    "data:\n  train: [small, large]\n  mixing: {temperature: 0}": (3, "must be a number >= 0.01"),
    "data:\n  train: small\n  mixing: {temperature: 2.0}": (3, "nothing to mix it with"),
    "data:\n  train: [small, large]\n  mixing: {until: first_exhausted}": (3, "each row is seen once per epoch"),
    "data:\n  train: [{path: small, proportion: 1}, {path: large, proportion: 2}]\n  mixing: {temperature: 2.0}": (
        3,
        "leave out the proportions",
    ),
    "data:\n  train: {path: small, loss_weight: 0.5}": (2, "sources count against each other"),
    "data:\n  train: small\n  validation: {path: large, loss_weight: 0.5}": (3, "unknown key"),
    "data: {train: small}\nstrategy:\n  replay: {data: no.jsonl}": (3, "is not on this machine"),
    "data: {train: small}\nstrategy:\n  replay: {data: large, share: 1}": (3, "must be a number >= 0 and < 1"),
    "data: {train: small}\nstrategy:\n  replay: {share: 0.1}": (3, "is missing"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_is_refused_at_its_line(text: str, files: Path, tmp_path: Path) -> None:
    line, said = REFUSED[text]
    path = written(tmp_path, files, text)
    with pytest.raises(UserError) as caught:
        load_with_places([path], ["model.base=demo"], check_files=True)
    assert said in str(caught.value)
    assert f"run.yaml:{line}:" in str(caught.value)


def run_plan(path: Path, tmp_path: Path, *overrides: str) -> RunPlan:
    more = ["model.base=demo", f"storage={tmp_path}", "training.max_steps=40", "data.max_length=512", *overrides]
    config, places = load_with_places([path], more)
    with errors_at(config, places):
        return plan_run(config)


MIXED = """data:
  train:
  - {path: small, proportion: 1}
  - {path: large, proportion: 1, loss_weight: 0.5}
  validation_fraction: 0.2
strategy:
  replay: {data: {path: "demo:test", max_rows: 100, name: general}, share: 0.1}
"""


def test_a_plan_tells_the_mixture_and_measures_each_source(files: Path, tmp_path: Path) -> None:
    path = written(tmp_path, files, MIXED)
    plan = run_plan(path, tmp_path)
    assert plan.data_report is not None
    small, large, general = plan.data_report.train.sources
    assert [each.name for each in (small, large, general)] == ["small", "large", "general"]
    assert [each.is_replayed for each in (small, large, general)] == [False, False, True]
    total = sum(each.in_epoch.targets for each in (small, large, general))
    assert general.in_epoch.targets / total == pytest.approx(0.1, abs=0.02)
    assert small.in_epoch.targets / total == pytest.approx(0.45, abs=0.02)
    assert [store.name for store in plan.data.validation] == ["small", "large", "general"]
    assert [store.weight for store in plan.data.validation] == [small.passes, 0.5, general.passes]
    text = plan_text(plan)
    epochs = plan.optimization.num_rows / plan.data.train.num_rows
    assert f"small: {small.passes:.3g} passes per epoch" in text
    assert "large: each row once per epoch" in text
    assert "which weigh 0.5 each" in text
    assert "general (replay): " in text
    assert f"; in the run {round(epochs * general.in_epoch.documents)} documents" in text
    assert f"Each row of small is seen {small.passes * epochs:.3g} times in this run" in text
    left_out = general.documents - general.in_epoch.documents
    assert f"{left_out} of the {general.documents} documents of general are in no epoch" in text
    # Another mixture is another run, and no other number of rows is made of the same one.
    other = run_plan(path, tmp_path, "strategy.replay.share=0.2")
    assert {key_of(leaf) for leaf in differences(identity_of(plan), identity_of(other))} >= {"data.train"}
    assert not differences(identity_of(plan), identity_of(run_plan(path, tmp_path)))


def test_share_0_is_no_replay_and_is_said(files: Path, tmp_path: Path) -> None:
    none = run_plan(written(tmp_path, files, "data: {train: [small, large]}\n"), tmp_path)
    path = written(tmp_path, files, "data: {train: [small, large]}\nstrategy: {replay: {data: 'demo:test', share: 0}}\n")
    zero = run_plan(path, tmp_path)
    assert identity_of(zero) == identity_of(none)
    assert zero.data == none.data
    assert [note for note in zero.notes if note not in none.notes] == ["strategy.replay.share is 0: no row is replayed."]
    assert "mixture" not in plan_text(zero)


def test_names_of_metrics_follow_the_sources_of_held_out_rows() -> None:
    data: dict[str, Any] = {"train": ["a.jsonl", "validation.jsonl"], "validation_fraction": 0.1}
    replay = {"strategy": {"replay": {"data": "old.jsonl"}}}
    several = [name for name in measured(config_from({"data": data} | replay)) if name.endswith("/loss")]
    assert several == ["validation/loss", "validation/a/loss", "validation/main/loss", "validation/old/loss"]
    alone = measured(config_from({"data": data | {"train": "a.jsonl"}}))
    assert alone == ["validation/loss", "validation/perplexity", "validation/bits_per_byte"]


def test_a_plan_without_rows_counts_what_is_repeated_and_replayed(files: Path) -> None:
    sources = [{"path": str(files / "small.jsonl"), "proportion": 1}, {"path": str(files / "large.jsonl"), "proportion": 1}]
    sections: dict[str, Any] = {"data": {"train": sources}, "strategy": {"replay": {"data": "demo:train", "share": 0.5}}}
    asked = config_from(sections)
    large = (files / "large.jsonl").stat().st_size
    assert assumed_data(asked, 512, None).train.num_tokens == pytest.approx(4 * large / 4, abs=2)
    assert [source.path for source in trained_sources(asked)][-1] == "demo:train"
    assert mixture_of(asked) == Mixture(proportions=(1.0, 1.0), num_replayed=1, replay_share=0.5)
