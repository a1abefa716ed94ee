"""Requests to a run: what one rank has heard, all ranks act on, and the ranks talk about it no more often than they must."""

from typing import Any

from raytune.training.steps.requests import Request, Requests, SaveClock


class Gather:
    """The ranks of a run in one process: rank 0 gathers what the others have said."""

    def __init__(self, *others: set[Request]) -> None:
        self.others, self.num_calls = others, 0

    def __call__(self, value: Any) -> list[Any]:
        self.num_calls += 1
        return [value, *self.others]


def test_what_any_rank_has_heard_is_agreed_on() -> None:
    assert Requests([lambda: ()], Gather({Request.SAVE}, set())).agreed() == {Request.SAVE}
    assert Requests([lambda: [Request.SAVE]], Gather(set())).agreed() == {Request.SAVE}
    assert Requests([lambda: ()], Gather(set())).agreed() == frozenset()


def test_a_run_of_which_nothing_can_be_asked_makes_no_collective() -> None:
    gather = Gather()
    assert Requests([], gather).agreed() == frozenset()
    assert gather.num_calls == 0


def test_all_requests_share_one_collective() -> None:
    gather = Gather()
    Requests([lambda: (), lambda: [Request.SAVE], lambda: ()], gather).agreed()
    assert gather.num_calls == 1


def test_a_save_is_asked_for_when_its_time_has_come() -> None:
    now = [100.0]
    clock = SaveClock(60.0, lambda: now[0])
    assert not clock()
    now[0] = 160.0
    assert set(clock()) == {Request.SAVE}
    clock.saved()
    assert not clock()
