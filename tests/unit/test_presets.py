"""Claims about presets: what they set lies below what is written, is told with its reason, and suits every method."""

from pathlib import Path
from typing import get_args

import pytest

from raytune.config.load import config_diff, config_from, config_with, dump_written, dump_yaml, load_config
from raytune.config.problems import ConfigError
from raytune.config.reading.presets import preset_reasons, presets
from raytune.config.sections.run import Preset, RunConfig
from raytune.config.words.guides import guides
from raytune.plan.methods import METHODS
from raytune.sweeps.space import trial_config, trials_of
from tests.unit.plan_cases import planned
from tests.variants import chequered

PLANNED = {"adapter", "training"}


def at(config: RunConfig, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def test_the_names_in_the_schema_are_those_in_the_file():
    assert get_args(Preset) == tuple(presets())


@pytest.mark.parametrize("name", get_args(Preset))
def test_a_preset_sets_what_it_says_and_nothing_else_and_says_why(name: str):
    config, values = config_from({"preset": name}), presets()[name].values
    assert {key: at(config, key) for key in values} == {key: value for key, (value, _) in values.items()}
    assert {key for key, _, _ in config_diff(RunConfig(), config)} == {"preset", *values}
    assert all(at(RunConfig(), key) != value for key, (value, _) in values.items()), "it would set a default"
    said = list(preset_reasons(config))
    assert len(said) == len(values)
    for sentence, (key, (_, why)) in zip(said, values.items(), strict=True):
        assert sentence.startswith(f"{key} is ")
        assert why in sentence


def test_what_is_written_wins_in_files_and_on_the_command_line(tmp_path: Path):
    (tmp_path / "low.yaml").write_text("training:\n  num_train_epochs: 7\nadapter:\n  rank: 4\n")
    (tmp_path / "high.yaml").write_text("preset: code\n")
    config = load_config([tmp_path / "low.yaml", tmp_path / "high.yaml"], ["adapter.alpha=9"])
    written = {"training.num_train_epochs": 7, "adapter.rank": 4, "adapter.alpha": 9}
    assert {key: at(config, key) for key in written} == written
    assert not list(preset_reasons(config)), "it set none of these"
    assert load_config([tmp_path / "high.yaml"], ["preset=null"]) == load_config([])


@pytest.mark.parametrize(("method", "name"), chequered([*METHODS], get_args(Preset)))
def test_a_preset_suits_every_method_and_survives_a_round_trip(method: str, name: str, tmp_path: Path):
    config = config_from({"preset": name, "adapter": {"method": method}, "training": {"lr_scheduler_type": "constant"}})
    assert config.adapter.method == method
    assert config_from(config) == config
    (tmp_path / "dumped.yaml").write_text(dump_yaml(config))
    assert load_config([tmp_path / "dumped.yaml"]) == config


def test_a_default_that_is_written_over_a_preset_stays_wherever_the_config_goes(tmp_path: Path):
    written = {"preset": "code", "adapter": {"rank": 16}, "training": {"num_train_epochs": "auto"}}
    config = config_from(written)
    for text in (dump_yaml(config), dump_yaml(config, full=True), dump_written(config)):
        (tmp_path / "dumped.yaml").write_text(text)
        again = load_config([tmp_path / "dumped.yaml"])
        assert again == config
        assert (at(again, "adapter.rank"), at(again, "adapter.alpha"), at(again, "training.num_train_epochs")) == (
            16,
            32,
            "auto",
        )
        assert [said.partition(" ")[0] for said in preset_reasons(again)] == ["adapter.alpha"]


def test_alpha_of_a_preset_is_twice_the_rank_that_is_written():
    few = config_from({"preset": "code", "adapter": {"rank": 8}})
    assert (at(few, "adapter.rank"), at(few, "adapter.alpha")) == (8, 16)
    assert [said for said in preset_reasons(few) if said.startswith("adapter.alpha is 16.0, set by preset code: twice the rank")]
    assert at(config_from({"preset": "code", "adapter": {"rank": 8, "alpha": 4}}), "adapter.alpha") == 4
    space = {"adapter.rank": {"grid": [4, 64]}}
    sweep = config_from({"preset": "style", "data": {"validation_fraction": 0.1}, "sweep": {"space": space}})
    assert [at(trial_config(sweep, trial), "adapter.alpha") for trial in trials_of(sweep)] == [8, 128]
    with pytest.raises(ConfigError) as refused:
        config_from({"preset": "code", "adapter": {"rank": -8}})
    assert [problem.key for problem in refused.value.problems] == ["adapter.rank"]


def test_a_preset_makes_way_for_what_is_laid_over_its_config_later():
    code = config_from({"preset": "code", "training": {"weight_decay": 0.1}})
    style = config_with(code, {"preset": "style"})
    assert style == config_from({"preset": "style", "training": {"weight_decay": 0.1}})
    assert config_with(code, {"preset": None}) == config_from({"training": {"weight_decay": 0.1}})
    assert config_with(code, {"adapter.method": "vera"}).adapter == config_from({"adapter": {"method": "vera"}}).adapter
    constant = config_with(config_from({"preset": "domain"}), {"training.lr_scheduler_type": "constant"})
    assert constant.training.min_lr_ratio == 0
    space = {"adapter.method": {"grid": ["lora", "vera"]}, "training.lr_scheduler_type": {"grid": ["cosine", "constant"]}}
    sweep = config_from({"preset": "domain", "data": {"validation_fraction": 0.1}, "sweep": {"space": space}})
    configs = [trial_config(sweep, trial) for trial in trials_of(sweep)]
    drawn = {(one.adapter.model_dump()["rank"], one.training.min_lr_ratio) for one in configs}
    assert drawn == {(128, 0.1), (128, 0), (256, 0.1), (256, 0)}


def test_what_is_not_read_is_not_said_to_be_set():
    said = " ".join(preset_reasons(config_from({"preset": "chat", "training": {"max_steps": 5, "warmup_steps": 1}})))
    assert "num_train_epochs" not in said
    assert "warmup_ratio" not in said
    assert "neftune_noise_alpha" in said


@pytest.mark.parametrize("name", ["style", "code"])
def test_ranks_and_targets_of_a_preset_are_those_of_lora(name: str):
    """A rank of 8 is small for LoRA and starves VeRA, and `attention` is no norm."""
    for method in METHODS.keys() - {"trainable_tokens"}:  # which needs tokens
        plan = planned(preset=None, **config_from({"preset": name, "adapter": {"method": method}}).model_dump(include=PLANNED))
        own = planned(adapter={"method": method}).adapter
        assert (plan.adapter == own) == (method not in ("lora", "qlora"))


def test_what_suits_the_rest_not_is_left_out_of_a_preset_and_refused_of_a_person():
    constant = {"training": {"lr_scheduler_type": "constant"}}
    assert config_from({"preset": "domain", **constant}).training.min_lr_ratio == 0
    with pytest.raises(ConfigError, match="min_lr_ratio"):
        config_from({"preset": "domain", "training": constant["training"] | {"min_lr_ratio": 0.1}})


NEW: dict[str, object] = {"new_tokens": ["<tool>"]}


@pytest.mark.parametrize(
    ("sections", "noise", "decay"),
    [
        ({}, 5.0, 0.1),
        ({"adapter": {"method": "prompt_tuning"}}, 0.0, "auto"),
        ({"adapter": {"method": "p_tuning"}}, 0.0, "auto"),
        ({"adapter": {"method": "prefix_tuning"}}, 5.0, "auto"),
        ({"adapter": {"method": "ia3"}}, 5.0, "auto"),
        ({"adapter": {"method": "adalora"}}, 5.0, 0.1),
        ({"model": NEW, "adapter": {"method": "trainable_tokens"}}, 0.0, "auto"),
        ({"model": NEW}, 0.0, 0.1),
        ({"model": NEW, "adapter": {"method": "full"}}, 5.0, 0.1),
        ({"adapter": {"method": "qlora", "trainable_tokens": ["a"]}}, 0.0, 0.1),
        ({"model": NEW, "adapter": {"trainable_tokens": [], "modules_to_save": ["embed_tokens", "lm_head"]}}, 5.0, 0.1),
    ],
)
def test_noise_and_decay_of_a_preset_are_left_out_where_they_do_not_suit(
    sections: dict[str, dict[str, object]], noise: float, decay: object
):
    """Noise would be refused, though nobody wrote it; a decay would draw rows and factors to 0."""
    config = config_from({"preset": "small_data", **sections})
    assert (config.training.neftune_noise_alpha, config.training.weight_decay) == (noise, decay)
    said = " ".join(preset_reasons(config))
    assert ("neftune" in said, "weight_decay" in said) == (noise != 0, decay == 0.1)
    assert config_from(config) == config


def test_an_unknown_preset_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"chat.*small_data"):
        config_from({"preset": "converation"})


def test_the_guide_shows_every_value():
    text = guides()["presets"].text
    for name, preset in presets().items():
        section = text.partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert preset.purpose in section
        for key, (value, why) in preset.values.items():
            shown = f"{value:g}" if isinstance(value, float) else value
            assert f"| `{key}` | {shown} | {why} |" in section
