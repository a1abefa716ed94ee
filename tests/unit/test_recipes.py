"""Claims about the recipes: each says what it is for and fits the machines that it names; together they show what there is."""

import pytest

from raytune.launch.cluster.host import this_machine
from raytune.plan.ahead import assumed_data, plan_ahead
from raytune.plan.choosing.choose import choose_plan
from raytune.plan.choosing.requirements import choose_row_length
from raytune.plan.choosing.setting import settle
from raytune.plan.model.references import planned_shape
from tests.recipes import FOLDER, RECIPES, recipe

TOKENS = 20_000_000


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_says_what_it_is_for_and_is_named_as_its_file(name: str):
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# yaml-language-server: ")
    assert lines[1].startswith("# ")
    assert lines[1].endswith(".")
    assert len([line for line in lines[2:] if line]) <= 20
    assert recipe(name).name == name


@pytest.mark.parametrize("name", [name for name in RECIPES if recipe(name).cluster.instance])
def test_a_recipe_fits_the_machines_that_it_names(name: str):
    config = recipe(name)
    plan = plan_ahead(config, TOKENS)
    assert plan.cost is not None
    assert plan.cost.num_nodes == config.cluster.nodes


@pytest.mark.parametrize("name", [name for name in RECIPES if not recipe(name).cluster.instance])
def test_a_recipe_without_an_instance_is_for_any_machine(name: str):
    config = recipe(name)
    shape = planned_shape(config.model.base)
    data = assumed_data(config, choose_row_length(config, shape), 1_000_000)
    plan = choose_plan(settle(config, shape, this_machine(config.cluster)), data, model_path=config.model.base, storage="runs")
    assert plan.cluster.device == "cpu"


def test_recipes_show_sizes_methods_presets_and_strategies():
    recipes = [recipe(name) for name in RECIPES]
    assert len(recipes) >= 12
    assert {"full", "lora", "qlora"} <= {each.adapter.method for each in recipes}
    assert {each.cluster.nodes for each in recipes} >= {1, 2, 8}
    assert sum(each.preset is not None for each in recipes) >= 3
    frozen = [each.strategy.freeze for each in recipes]
    assert any(freeze.first_layers for freeze in frozen)
    assert any(freeze.train_only for freeze in frozen)
    assert any(each.strategy.layer_rate_decay < 1 for each in recipes)
    assert any(each.strategy.unfreeze for each in recipes)
