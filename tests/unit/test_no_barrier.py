"""Ray Train's ranks have no process through which they wait for each other; who wants to is told so."""

import pickle

import pytest

from raytune.launch.attempts.no_barrier import NoBarrier


def test_a_collective_of_ray_train_is_refused_on_a_rank_and_not_passed_over() -> None:
    on_a_rank = pickle.loads(pickle.dumps(NoBarrier.options(label_selector={}).remote(timeout_s=1, warn_interval_s=1)))
    with pytest.raises(NotImplementedError, match=r"ray\.train\.collective\.barrier .* torch\.distributed"):
        on_a_rank.broadcast_from_rank_zero.remote(
            world_rank=0, world_size=2, data=None, caller_method_name="ray.train.collective.barrier", collective_seq=1
        )
