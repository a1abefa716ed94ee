"""What is equal, nearly so, or contradicts, against comparing every row with every other one."""

import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.data.quality.alike import contradicted, equal_to_earlier, found_in, near_in, near_to_earlier
from raytune.data.quality.passages import hashes_of, only_words, runs_of, script_of, shingles_of, words_and_signs
from raytune.data.quality.signatures import NUM_OF_ROW, bands_for, bands_of, signatures_of
from tests.tiny import PATIENT

FEW = st.lists(st.integers(0, 4), max_size=30)


def digests(numbers: list[int]) -> np.ndarray:
    """Of two numbers each, the first of which says little."""
    return np.array([[number % 2, number] for number in numbers], np.uint64).reshape(-1, 2)


@PATIENT
@given(rows=FEW, others=FEW)
def test_equal_rows_are_found_as_by_comparing_all_of_them(rows: list[int], others: list[int]) -> None:
    first = [rows.index(row) if rows.index(row) < index else -1 for index, row in enumerate(rows)]
    assert equal_to_earlier(digests(rows)).tolist() == first
    there = [others.index(row) if row in others else -1 for row in rows]
    assert found_in(digests(rows), digests(others)).tolist() == there


@PATIENT
@given(rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=30))
def test_contradictions_are_found_as_by_comparing_all_rows(rows: list[tuple[int, int]]) -> None:
    def first_other(prompt: int, answer: int) -> int:
        if prompt == 0:  # no prompt
            return -1
        return next((index for index, row in enumerate(rows) if row[0] == prompt and row[1] != answer), -1)

    prompts, answers = (np.array([row[place] for row in rows], np.uint64) for place in (0, 1))
    assert contradicted(prompts, answers).tolist() == [first_other(*row) for row in rows]


# --- Near duplicates -----------------------------------------------------------------------------------------------------------

SIMILARITY = 0.8


def rows_with_copies(seed: int, num_rows: int = 60) -> list[np.ndarray]:
    """Sets of 200 numbers: new ones, and copies of earlier ones that share 95 %, 85 %, 70 % or 50 % of either."""
    draw = np.random.default_rng(seed)
    rows: list[np.ndarray] = []
    for _ in range(num_rows):
        new = draw.integers(0, 2**63, 200).astype(np.uint64)
        if rows and draw.random() < 0.6:
            similarity = draw.choice([0.95, 0.9, 0.65, 0.5])
            kept = round(200 * 2 * similarity / (1 + similarity))
            new[:kept] = rows[draw.integers(len(rows))][:kept]
        rows.append(new)
    return rows


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    return len(np.intersect1d(one, other)) / len(np.union1d(one, other))


@pytest.mark.parametrize("seed", range(4))
def test_near_duplicates_are_those_of_all_pairs(seed: int) -> None:
    rows = rows_with_copies(seed)
    shares = np.array([[jaccard(one, other) for other in rows] for one in rows])
    signatures = signatures_of(rows, NUM_OF_ROW)
    # What is compared here is finding pairs: the similarity is exact, but signatures decide which pairs are looked at.
    keys = bands_of(signatures, *bands_for(SIMILARITY))
    found = near_to_earlier(lambda band: keys[band], len(keys), len(rows), lambda a, b: shares[a, b], SIMILARITY)
    wanted, kept = [], []
    for row in range(len(rows)):
        original = next((other for other in kept if shares[row, other] >= SIMILARITY), -1)
        wanted.append(original)
        kept += [row] if original < 0 else []
    assert found.tolist() == wanted
    assert (found >= 0).sum() > 5
    half = len(rows) // 2
    there = near_in(
        lambda band: (keys[band][half:], keys[band][:half]),
        len(keys),
        len(rows) - half,
        lambda row, other: shares[row + half, other],
        SIMILARITY,
    )
    assert ((there >= 0) == (shares[half:, :half] >= SIMILARITY).any(axis=1)).all()
    assert all(shares[row + half, other] >= SIMILARITY for row, other in enumerate(there) if other >= 0)


def test_each_row_that_is_near_is_so_to_one_that_is_kept_though_a_chain_leads_further() -> None:
    rows = [np.arange(start, start + 1000, dtype=np.uint64) * 7919 for start in range(0, 800, 100)]  # neighbours share 82 %
    shares = np.array([[jaccard(one, other) for other in rows] for one in rows])
    keys = bands_of(signatures_of(rows, NUM_OF_ROW), *bands_for(SIMILARITY))
    found = near_to_earlier(lambda band: keys[band], len(keys), len(rows), lambda a, b: shares[a, b], SIMILARITY)
    assert found.tolist() == [-1, 0, -1, 2, -1, 4, -1, 6]


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_miss_one_in_a_hundred_at_most(similarity: float) -> None:
    bands, size = bands_for(similarity)
    assert bands * size <= NUM_OF_ROW
    assert 1 - (1 - similarity**size) ** bands >= 0.99


@pytest.mark.parametrize("size", [1, 5, 50, 500])
def test_the_share_of_equal_numbers_is_an_unbiased_estimate_of_what_sets_share(size: int) -> None:
    draw = np.random.default_rng(size)
    kept, estimates, num_pairs = max(1, round(0.9 * size)), [], 200
    for _ in range(num_pairs):
        one = draw.integers(0, 2**63, size).astype(np.uint64)
        other = np.concatenate([one[:kept], draw.integers(0, 2**63, size - kept).astype(np.uint64)])
        signatures = signatures_of([one, other], NUM_OF_ROW)
        estimates.append((signatures[0] == signatures[1]).mean() - jaccard(one, other))
    # The deviation of a mean of 128 x 200 draws is at most 0.5 / 160, and 5 of them are missed once in two million times.
    assert abs(np.mean(estimates)) < 5 * 0.5 / (NUM_OF_ROW * num_pairs) ** 0.5
    assert np.std(estimates) < 0.055


def test_signatures_do_not_depend_on_what_else_is_signed_nor_on_the_process() -> None:
    rows = rows_with_copies(0, 10)
    together = signatures_of(rows, NUM_OF_ROW)
    assert all((signatures_of([row], NUM_OF_ROW)[0] == signature).all() for row, signature in zip(rows, together))
    code = (
        "from raytune.data.quality.passages import *\nfrom raytune.data.quality.signatures import *\n"
        "print(signatures_of([shingles_of(hashes_of('a b c d e f'.split()), 5)], 8).tolist())"
    )
    told = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert told == {f"{signatures_of([shingles_of(hashes_of(['a', 'b', 'c', 'd', 'e', 'f']), 5)], 8).tolist()}\n"}


# --- Words ---------------------------------------------------------------------------------------------------------------------


def test_words_are_told_without_case_and_punctuation_and_signs_of_sums_are_kept() -> None:
    assert " ".join(words_and_signs("What is 5 - 3? I don't know; x==y.")) == "what is 5 - 3 i don t know x = = y"
    assert only_words(words_and_signs("well-known a+b")) == ["well", "known", "a", "b"]
    assert words_and_signs("Héllo_wörld ＡＢＣ") == ["héllo", "_", "wörld", "abc"]
    assert words_and_signs("東京 tower") == ["東", "京", "tower"], "no spaces there, so each letter is a word"
    assert words_and_signs("हिन्दी में।") == ["हिन्दी", "में"], "vowel signs are of their word"


@PATIENT
@given(text=st.text(max_size=60))
def test_a_text_of_ascii_has_the_words_that_it_has_beside_others(text: str) -> None:
    ascii_text = re.sub(r"[^\x00-\x7f]", "", text)
    assert [*words_and_signs(ascii_text), "é"] == words_and_signs(f"{ascii_text} é")
    assert len(hashes_of(words_and_signs(text))) == len(words_and_signs(text))


@PATIENT
@given(words=st.lists(st.sampled_from("abc"), max_size=40), length=st.integers(1, 6))
def test_runs_of_words_are_equal_where_the_words_are(words: list[str], length: int) -> None:
    runs = [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
    numbers = runs_of(hashes_of(words), length)
    assert len(numbers) == len(runs)
    assert len({*numbers.tolist()}) == len({*runs})
    assert len({*zip(numbers.tolist(), runs)}) == len({*runs})


def test_a_short_text_is_one_run() -> None:
    assert len(shingles_of(hashes_of(["a", "b"]), 5)) == 1
    assert len(shingles_of(hashes_of([]), 5)) == 0


@pytest.mark.parametrize(
    ("text", "script"),
    [("hello", "Latin"), ("été", "Latin"), ("Привет", "Cyrillic"), ("東京", "Han"), ("한국어", "Hangul"), ("12 !", ""), ("", "")],
)
def test_scripts_are_named_as_unicode_does(text: str, script: str) -> None:
    assert script_of(text) == script
