"""How several adapters become one: the ways there are, what each of them needs, and what is refused. Pure.

The arithmetic is PEFT's (`add_weighted_adapter`), and so are the names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

from raytune.errors import UserError

CombinationKind = Literal[
    "cat",
    "linear",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
MajoritySign = Literal["total", "frequency"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """What is asked for; `asked_combination` checks it."""

    kind: CombinationKind = "cat"
    weights: tuple[float, ...]
    """Of the adapters, in their order."""
    density: float | None = None
    """Share of the numbers that is kept."""
    seed: int | None = None
    """Of the numbers that are dropped by chance."""
    rank: int | None = None
    """Of what a singular value decomposition leaves; None: the largest of the adapters."""
    majority_sign: MajoritySign = "total"
    """Whose sign counts: that of the sum, or that of most."""

    @property
    def of_updates(self) -> bool:
        """Whether whole updates are combined and then decomposed, rather than the factors of each."""
        return self.kind.endswith("svd")

    @property
    def needs_equal_ranks(self) -> bool:
        """Whether factors are added to each other, which have to be of one shape."""
        return self.kind != "cat" and not self.of_updates

    @property
    def drops_by_chance(self) -> bool:
        return self.kind.startswith("dare")


def asked_combination(
    num_adapters: int,
    kind: str | None,
    weights: Sequence[float] | None,
    density: float | None,
    seed: int | None,
    rank: int | None,
    majority_sign: str | None,
) -> Combination | None:
    """What a user asks for; None: a single adapter as it is.

    Args:
        kind: None: the exact sum.
        weights: None: the same share of 1 for each.
        majority_sign: None: that of the sum.

    Raises:
        UserError: if something is missing, is more than the kind takes, or is no such number.
    """
    if num_adapters == 1 and all(said is None for said in (kind, weights, density, seed, rank, majority_sign)):
        return None
    return _combination_of(num_adapters, kind or "cat", weights, density, seed, rank, majority_sign)


def _combination_of(
    num_adapters: int,
    kind: str,
    weights: Sequence[float] | None,
    density: float | None,
    seed: int | None,
    rank: int | None,
    majority_sign: str | None,
) -> Combination:
    kinds = get_args(CombinationKind)
    if kind not in kinds:
        raise UserError(f"--combination is {kind}, expected one of {', '.join(kinds)}.")
    asked = Combination(
        kind=kind,  # pyright: ignore[reportArgumentType]
        weights=tuple(weights) if weights is not None else (1 / num_adapters,) * num_adapters,
        density=density,
        seed=seed,
        rank=rank,
        majority_sign=majority_sign or "total",  # pyright: ignore[reportArgumentType]
    )
    if len(asked.weights) != num_adapters:
        raise UserError(
            f"--weights has {len(asked.weights)} numbers for {num_adapters} adapters: give each one, as in --weights 0.7,0.3."
        )
    if not all(map(isfinite, asked.weights)) or not any(asked.weights):
        raise UserError(f"--weights are {', '.join(map(str, asked.weights))}: they must be finite, and not all of them 0.")
    prunes = asked.kind not in ("cat", "linear", "svd")
    if prunes and density is None:
        raise UserError(f"--combination {kind} drops numbers: say which share of them it keeps, as in --density 0.5.")
    if density is not None and not prunes:
        raise UserError(f"--density is {density}, but --combination {kind} drops nothing. Leave it out, or name another one.")
    if density is not None and not 0 < density <= 1:
        raise UserError(f"--density is {density}; it is the share that is kept, above 0 and at most 1.")
    if asked.drops_by_chance and seed is None:
        raise UserError(
            f"--combination {kind} drops numbers by chance: state the seed, as in --seed 0, so that it can be repeated."
        )
    if seed is not None and not asked.drops_by_chance:
        raise UserError(f"--seed is {seed}, but --combination {kind} leaves nothing to chance. Leave it out.")
    if rank is not None and (rank < 1 or not asked.of_updates):
        raise UserError(
            f"--rank is {rank}, but only the kinds that end in svd choose a rank, of at least 1; {kind} has that of its adapters."
        )
    if majority_sign is not None and (majority_sign not in get_args(MajoritySign) or "ties" not in kind):
        raise UserError(f"--majority-sign is {majority_sign}: total or frequency, and for TIES only; --combination is {kind}.")
    return asked
