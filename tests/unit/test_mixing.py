"""How often an epoch has the rows of each source and how much they count: as asked, the same always, and told."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.config.load import config_from, load_with_places
from raytune.config.sections.data import DataSource
from raytune.config.sections.row_sources import trained_sources
from raytune.config.words.metric_names import measured
from raytune.config.words.places import errors_at
from raytune.data.batches.batches import step_batches
from raytune.data.store.mixing import DrawnRows, EpochRows, balanced_order
from raytune.data.store.store import Store
from raytune.errors import UserError
from raytune.launch.planning import plan_run
from raytune.plan.ahead import assumed_data
from raytune.plan.data.mixing import EACH_ROW_ONCE, Mixture, mixture_of, passes_of_epoch
from raytune.plan.describe import plan_text
from raytune.plan.identity.identity import differences, identity_of
from raytune.plan.identity.settings import key_of
from raytune.plan.run_plan import RunPlan
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


@given(SIZES, st.data())
def test_passes_that_are_said_are_taken_and_bounds_leave_the_other_parts(sizes: list[int], data: st.DataObject) -> None:
    said = tuple(data.draw(st.lists(st.floats(0.01, 9), min_size=len(sizes), max_size=len(sizes))))
    assert passes(Mixture(passes=said), sizes) == list(said)
    free = passes(Mixture(temperature=5.0), sizes)
    bounds = tuple(data.draw(st.lists(st.floats(1, 3) | st.just(math.inf), min_size=len(sizes), max_size=len(sizes))))
    assert passes(Mixture(temperature=5.0, max_passes=bounds), sizes) == [min(one) for one in zip(free, bounds)]


def test_a_bound_makes_a_mixture_possible_that_would_have_no_end() -> None:
    assert passes(Mixture(proportions=(5000, 1), max_passes=(4.0, math.inf)), [10, 10]) == [4, 1]


# --- Which rows


@st.composite
def epochs_of_rows(draw: st.DrawFn) -> tuple[EpochRows, int, list[DrawnRows], np.ndarray]:
    """Rows of epochs, how many every epoch has, the parts, and the targets of each row."""
    num_fixed = draw(st.integers(0, 20))
    parts: list[DrawnRows] = []
    num_rows = num_fixed
    for size in draw(st.lists(st.integers(1, 40), min_size=num_fixed == 0, max_size=3)):
        parts.append(DrawnRows(first_row=num_rows, num_rows=size, per_epoch=draw(st.integers(1, size))))
        num_rows += size
    num_targets = np.array(draw(st.lists(st.integers(1, 500), min_size=num_rows, max_size=num_rows)), np.int64)
    return EpochRows(num_fixed, parts, num_targets), num_fixed, parts, num_targets


@PATIENT
@given(epochs_of_rows(), st.integers(0, 2**32), st.integers(1, 12))
def test_every_epoch_has_its_rows_once_and_over_epochs_each_is_seen_equally_often(
    case: tuple[EpochRows, int, list[DrawnRows], np.ndarray], seed: int, num_epochs: int
) -> None:
    epoch, num_fixed, parts, num_targets = case
    seen: Counter[int] = Counter()
    for number in range(num_epochs):
        rows = epoch.rows_at(np.arange(epoch.num_rows) + number * epoch.num_rows, seed).tolist()
        assert len(set(rows)) == epoch.num_rows, "none twice in an epoch"
        assert set(range(num_fixed)) <= set(rows)
        for part in parts:
            own = [row for row in rows if part.first_row <= row < part.first_row + part.num_rows]
            every = num_targets[part.first_row : part.first_row + part.num_rows]
            assert len(own) == part.per_epoch
            share = every.sum() * part.per_epoch / part.num_rows
            assert abs(num_targets[own].sum() - share) <= every.max() - every.min() + 1e-6, "within one row of its part"
        seen.update(rows)
    for part in parts:
        times = num_epochs * part.per_epoch / part.num_rows
        own = range(part.first_row, part.first_row + part.num_rows)
        assert all(seen[row] in (math.floor(times + 1e-9), math.ceil(times - 1e-9)) for row in own)


@PATIENT
@given(epochs_of_rows(), st.integers(0, 2**32), st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
def test_a_position_has_its_row_whatever_is_asked_beside_it(
    case: tuple[EpochRows, int, list[DrawnRows], np.ndarray], seed: int, positions: list[int]
) -> None:
    epoch = case[0]
    alone = [int(epoch.rows_at(np.array([position]), seed)[0]) for position in positions]
    assert epoch.rows_at(np.array(positions), seed).tolist() == alone


@given(st.lists(st.integers(0, 500), min_size=1, max_size=60))
def test_neighbours_in_a_balanced_order_have_their_share(numbers: list[int]) -> None:
    order = balanced_order(np.array(numbers))
    assert sorted(order.tolist()) == list(range(len(numbers)))
    sums = np.cumsum([0, *np.tile(np.array(numbers)[order], 2)])
    for count in range(1, len(numbers) + 1):
        strays = sums[count:] - sums[:-count] - count * np.mean(numbers)
        assert np.abs(strays).max() <= max(numbers) - min(numbers) + 1e-6


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
    assert set(seen["small"]) == {int(asked) + 1}, "whole passes, and all of it in rows of which an epoch has a part"
    assert all(len(set(store.sources(row))) == len(store.sources(row)) for row in range(store.num_rows))
    first, second = store.report.sources
    assert first.in_epoch.targets / (first.in_epoch.targets + second.in_epoch.targets) == pytest.approx(1 / 4, abs=0.01)
    rows = store.epoch.rows_at(np.arange(store.epoch.num_rows), 3)
    of_small = Counter(Path(file).stem for row in rows.tolist() for file, _ in store.sources(row))["small"]
    assert of_small / 8 == pytest.approx(first.passes, abs=1 / 8)
    assert first.passes == pytest.approx(asked, abs=1 / 16)
    assert (first.rows, first.documents, first.targets) == (8, 8, small)
    assert store.info.num_documents == first.in_epoch.documents + second.in_epoch.documents
    assert store.info.num_targets == first.in_epoch.targets + second.in_epoch.targets
    assert store.num_tokens == first.in_epoch.tokens + second.in_epoch.tokens
    assert store.report.fill == pytest.approx(store.num_tokens / (store.info.rows_per_epoch * 512))


def documents_of_epoch(store: Store, epoch: int) -> Counter[tuple[str, int]]:
    rows = store.epoch.rows_at(np.arange(store.epoch.num_rows) + epoch * store.epoch.num_rows, 0)
    return Counter((Path(file).stem, line) for row in rows.tolist() for file, line in store.sources(row))


def test_until_the_first_is_exhausted_no_document_is_seen_twice_and_each_epoch_takes_others(files: Path) -> None:
    store = opened(files, mixture=Mixture(proportions=(1.0, 1.0), until="first_exhausted"))
    large = store.report.sources[1]
    epochs = [documents_of_epoch(store, number) for number in range(math.ceil(1 / large.passes))]
    for epoch in epochs:
        assert set(epoch.values()) == {1}
        assert sum(name == "small" for name, _ in epoch) == 8
        assert 4 <= sum(name == "large" for name, _ in epoch) <= 14
    together = Counter(document for epoch in epochs for document in epoch)
    assert sum(name == "large" for name, _ in together) == 60, "over epochs all are seen"
    assert max(times for (name, _), times in together.items() if name == "large") <= 2


def test_passes_repeat_a_source_as_often_as_they_say(files: Path) -> None:
    store = opened(files, mixture=Mixture(passes=(3.0, 0.5)))
    assert [source.passes for source in store.report.sources] == [3.0, pytest.approx(0.5, abs=1 / 60)]
    first, second = documents_of_epoch(store, 0), documents_of_epoch(store, 1)
    assert {times for (name, _), times in first.items() if name == "small"} == {3}
    halves = [{document for document in epoch if document[0] == "large"} for epoch in (first, second)]
    assert len(halves[0] & halves[1]) <= 2
    assert [len(half) for half in halves] == [pytest.approx(30, abs=3)] * 2


@pytest.mark.parametrize("world", [2, 3, 8])
def test_a_mixture_is_the_same_on_any_number_of_workers_and_from_any_step_on(world: int, files: Path) -> None:
    store = opened(files, mixture=Mixture(passes=(1.5, 0.3)), packing="token_budget")
    num_rows = 3 * store.epoch.num_rows

    def rows(step: int, world: int) -> list[int]:
        shared = {"step": step, "world": world, "micro_batch_size": 1, "accumulation": 24 // world, "num_rows_in_run": num_rows}
        ranks = [step_batches(store, rank=rank, seed=5, **shared) for rank in range(world)]
        return [row for micro in zip(*ranks) for batch in micro for row in batch.rows]

    steps = range(num_rows // 24 + 1)
    assert [rows(step, world) for step in steps] == [rows(step, 1) for step in steps]
    again = opened(files, mixture=Mixture(passes=(1.5, 0.3)), packing="token_budget")
    order = again.epoch.rows_at(np.arange(24 * len(steps)), 5).tolist()
    assert [row for step in steps for row in rows(step, world)] == order


def test_weights_and_a_mixture_that_ask_for_nothing_change_no_byte(files: Path) -> None:
    plain = opened(files)
    asked = [
        opened(files, loss_weights=(1.0, 1.0)),
        opened(files, mixture=Mixture(temperature=1.0, until="first_exhausted")),
        opened(files, mixture=Mixture(replay_share=0.0)),
    ]
    digests = {file_digest(Path(store.info.path) / "rows-00000.arrow").sha256 for store in (plain, *asked)}
    assert len(digests) == 1
    assert plain.weight_of_row is None


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
    with pytest.raises(UserError, match=r"no document of .*large.jsonl: its part is less than half of one"):
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
    "data:\n  train: [small, large]\n  mixing: {until: first_exhausted}": (3, "which ask for a mixture"),
    "data:\n  train: [{path: small, proportion: 1}, {path: large, proportion: 2}]\n  mixing: {temperature: 2.0}": (
        3,
        "leave out the proportions",
    ),
    "data:\n  train: {path: small, loss_weight: 0.5}": (2, "sources count against each other"),
    "data:\n  train: {path: small, passes: 2}": (2, "sources count against each other"),
    "data:\n  train:\n  - {path: small, passes: 0}\n  - large": (3, "must be a number > 0"),
    "data:\n  train:\n  - {path: small, passes: 1001}\n  - large": (3, "must be a number > 0 and <= 1000"),
    "data:\n  train:\n  - {path: small, max_passes: 0.5}\n  - large": (3, "must be a number >= 1"),
    "data:\n  train:\n  - {path: small, max_passes: 2}\n  - large": (3, "which ask for a mixture"),
    "data:\n  train: [{path: small, proportion: 1, passes: 2}, {path: large, proportion: 1}]": (2, "a proportion or passes"),
    "data:\n  train: [{path: small, passes: 2}, large]\n  mixing: {temperature: 2}": (3, "leave out the passes"),
    "data:\n  train: [{path: small, proportion: 1, max_passes: 2}, {path: large, proportion: 1}]\n"
    "  mixing: {until: first_exhausted}": (2, "no source more than once"),
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
    assert f"An epoch has {general.passes:.1%} of the documents of general, and each epoch others" in text
    # Another mixture is another run, and no other number of rows is made of the same one.
    other = run_plan(path, tmp_path, "strategy.replay.share=0.2")
    assert {key_of(leaf) for leaf in differences(identity_of(plan), identity_of(other))} >= {"data.train"}
    assert not differences(identity_of(plan), identity_of(run_plan(path, tmp_path)))


def test_a_plan_tells_what_a_bound_takes_from_a_source(files: Path, tmp_path: Path) -> None:
    text = "data:\n  train:\n  - {path: small, proportion: 1, max_passes: 3}\n  - {path: large, proportion: 1}\n"
    plan = run_plan(written(tmp_path, files, text), tmp_path)
    assert plan.data_report is not None
    small, large = plan.data_report.train.sources
    assert (small.passes, large.passes) == (3, 1)
    share = 3 * small.targets / (3 * small.targets + large.targets)
    asked = f"max_passes bounds small to 3 passes per epoch, of the {large.targets / small.targets:.3g} that its part asks for"
    assert any(note.startswith(asked) and f"has {share:.1%} of" in note for note in plan.notes)
    assert any("in place of 50.0%" in note for note in plan.notes)


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
