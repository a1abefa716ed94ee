"""What `training.zero.overrides` may not set is refused before the data is read."""

from typing import Any

import pytest

from raytune.errors import UserError
from raytune.plan.deepspeed_keys import OWNED_KEYS, REMOVED_KEYS
from raytune.plan.requirements import check_before_data
from tests.unit.plan_cases import CPU, DEMO, config


def check(overrides: dict[str, Any]) -> None:
    check_before_data(config(training={"zero": {"overrides": overrides}}), DEMO, CPU)


def nested(key: str, value: Any) -> dict[str, Any]:
    """`{"a": {"b": value}}` for `a.b`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("key", REMOVED_KEYS)
def test_what_deepspeed_removed_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"sets {key}, which DeepSpeed 0.19 has removed"):
        check(nested(key, {"enabled": True}))


@pytest.mark.parametrize("key", OWNED_KEYS)
def test_what_raytune_decides_is_refused_with_its_own_word(key: str) -> None:
    with pytest.raises(UserError, match=f"sets {key}, which raytune decides.*{OWNED_KEYS[key] or 'delete it'}"):
        check(nested(key, 1))


def test_our_list_of_removed_keys_is_deepspeeds() -> None:
    from deepspeed.runtime import config as deepspeed_own

    theirs = {*deepspeed_own._REMOVED_TOP_LEVEL_CONFIG_KEYS}
    theirs |= {f"zero_optimization.{key}" for key in deepspeed_own._REMOVED_ZERO_CONFIG_KEYS}
    assert theirs == set(REMOVED_KEYS)


def test_other_keys_are_left_to_deepspeed() -> None:
    check({"zero_optimization": {"sub_group_size": 7, "offload_optimizer": {"pin_memory": False}}, "steps_per_print": 3})
