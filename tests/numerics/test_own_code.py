"""A model in a folder with modelling code of its own trains, is saved and is merged as the same model without such code."""

import inspect
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.llama import configuration_llama, modeling_llama

from raytune.cli import cli
from raytune.config.load import config_from
from raytune.config.problems import ConfigError
from raytune.config.sections.run import RunConfig
from raytune.data.templates.tokenizers import load_tokenizer, open_tokenizer
from raytune.errors import ModelError, UserError
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.launch.state.record import refuse_another_run, write_plan
from raytune.launch.state.result import RunResult
from raytune.model.files.base_content import base_content, content_changes
from raytune.model.merging.merge import merge_adapter
from raytune.model.meta_shape import meta_model
from raytune.run_folder import RunFolder
from raytune.training.run import Worker, train
from tests.tiny import save_tiny_model
from tests.variants import variants

IDS = torch.arange(1, 20)[None]


@pytest.fixture(scope="module", autouse=True)
def modules_of_models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where transformers copies such code before it runs it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setenv("HF_MODULES_CACHE", folder)
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return with_own_code(save_tiny_model(tmp_path / "plain"), tmp_path / "own-code")


@dataclass(frozen=True, kw_only=True)
class Bases:
    """Of the same weights."""

    plain: Path
    own: Path
    """With such code, which a process of its own looks at before the first run."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    folder = tmp_path_factory.mktemp("bases")
    plain = save_tiny_model(folder / "plain")
    return Bases(plain=plain, own=with_own_code(plain, folder / "own-code"))


@contextmanager
def gone(folder: Path) -> Iterator[None]:
    aside = folder.rename(folder.with_name("aside"))
    yield
    aside.rename(folder)


def with_own_code(plain: Path, folder: Path) -> Path:
    """The same weights; Llama's code beside them, under another name."""
    shutil.copytree(plain, folder)
    for module in (configuration_llama, modeling_llama):
        code = inspect.getsource(module).replace("from ...", "from transformers.").replace('"llama"', '"own_llama"')
        (folder / f"{module.__name__.rpartition('.')[2]}.py").write_text(f"{code}\nprint('code of a model may print')\n")
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration_llama.LlamaConfig", "AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own_llama", "auto_map": code}))
    return folder


def run_config(base: Path, name: str, method: str = "lora", **model: Any) -> RunConfig:
    return config_from(
        {
            "name": name,
            "storage": str(base.parent / "runs"),
            "model": {"base": str(base), **model},
            "data": {"train": {"path": "demo:train", "max_rows": 20}, "max_length": 512},
            "adapter": {"method": method},
            "training": {"max_steps": 2, "global_batch_size": 2, "learning_rate": 5e-3},
            "cluster": {"workers": 1},
        }
    )


def trained(config: RunConfig) -> RunResult:
    plan = prepare(config, this_machine(config.cluster), map).plan
    folder = RunFolder(plan.storage, plan.name)
    write_plan(folder, plan)
    train(plan, Worker(rank=0, world_size=1, device_index=0, attempt=1, report=lambda metrics: None))
    return RunResult.read(folder)


@pytest.fixture(scope="module")
def adapted(bases: Bases) -> RunResult:
    """A finished run of an adapter of a base with such code."""
    return trained(run_config(bases.own, "adapted", trust_remote_code=True))


def logits(folder: Path | str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("method", variants(["full"], ["lora"]))
def test_own_code_trains_as_the_same_code_of_transformers(method: str, bases: Bases) -> None:
    ours = trained(run_config(bases.own, f"ours-{method}", method, trust_remote_code=True))
    theirs = trained(run_config(bases.plain, f"theirs-{method}", method))
    assert ours.plan.num_parameters == theirs.plan.num_parameters
    assert ours.history.series("train/loss") == theirs.history.series("train/loss")
    file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    one, other = load_file(Path(ours.model_path) / file), load_file(Path(theirs.model_path) / file)
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    if method == "full":  # the saved folder is a model of its own
        with gone(bases.own):
            assert logits(ours.model_path).equal(logits(theirs.model_path))


def test_an_adapter_of_own_code_is_merged_where_that_code_is_trusted(bases: Bases, adapted: RunResult, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--trust-remote-code"):
        merge_adapter(Path(adapted.model_path), tmp_path / "merged")
    arguments = ["merge", adapted.model_path, "--output", str(tmp_path / "merged"), "--trust-remote-code"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    model = AutoModelForCausalLM.from_pretrained(bases.own, trust_remote_code=True)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(model, adapted.model_path)(IDS).logits
    with gone(bases.own):
        # Two orders of the same additions.
        assert torch.allclose(logits(tmp_path / "merged"), expected, atol=1e-5)


def test_code_that_changed_is_another_base(bases: Bases, adapted: RunResult, tmp_path: Path) -> None:
    plan = adapted.plan
    folder = RunFolder(plan.storage, plan.name)
    own = shutil.copytree(bases.own, tmp_path / "changed")
    (own / "parts").mkdir()
    for code in (own / "modeling_llama.py", own / "parts" / "more.py"):
        with code.open("a") as file:
            file.write("\n# another day\n")
    now = base_content(str(own), None, trust_remote_code=True)
    assert {name for name, _, _ in content_changes(plan.model.content or {}, now)} == {"modeling_llama.py", "parts/more.py"}
    with pytest.raises(UserError, match=r"model\.base \(its file modeling_llama\.py\): [0-9a-f]+ -> [0-9a-f]+"):
        refuse_another_run(folder, plan.model_copy(update={"model": plan.model.model_copy(update={"content": now})}))


def test_code_that_is_needed_and_not_trusted_is_refused_before_anything_starts(own: Path, tmp_path: Path) -> None:
    (own / "modeling_llama.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (own / "configuration_llama.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = run_config(own, "ours")
    with pytest.raises(ModelError, match=r"no model of type 'own_llama'.*set model\.trust_remote_code to true \("):
        prepare(config, this_machine(config.cluster), map)
    assert not (tmp_path / "ran").exists()
    assert not Path(config.storage).exists()


def test_code_of_another_repository_is_refused(own: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "owner/code--modeling_llama.LlamaForCausalLM"
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"from another repository .*write 'modeling_llama\.LlamaForCausalLM'"):
        meta_model(str(own), trust_remote_code=True)


def test_code_of_another_repository_is_refused_for_the_tokenizer_too(own: Path) -> None:
    settings = json.loads((own / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["owner/code--tok.Tokenizer", None]}
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    for load in (open_tokenizer, load_tokenizer):
        with pytest.raises(ModelError, match=r"tokenizer_config\.json of .*AutoTokenizer from another repository"):
            load(str(own), trust_remote_code=True)


def test_a_hub_id_needs_its_commit_and_a_folder_does_not() -> None:
    with pytest.raises(ConfigError, match=r"full 40-digit commit hash; a local folder, .* such as \./owner/name"):
        config_from({"model": {"base": "owner/name", "trust_remote_code": True}})
    config_from({"model": {"base": "owner/name", "trust_remote_code": True, "revision": "0" * 40}})
    for folder in ("./owner/name", "/models/name", "~/name", "models/of/mine"):
        config_from({"model": {"base": folder, "trust_remote_code": True}})
