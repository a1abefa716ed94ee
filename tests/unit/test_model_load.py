"""What a base may be, what is refused, and what a loaded model is ready for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.integrations.neftune import neftune_post_forward_hook

from raytune.config.sections.adapter import FullAdapter, LoraAdapter
from raytune.config.sections.model import Quantization
from raytune.data.batches.batches import Batch
from raytune.data.templates.tokenizers import load_tokenizer
from raytune.errors import ModelError
from raytune.model.attention.attention import model_inputs
from raytune.model.demo import demo_base_path
from raytune.model.files.files import resolve_model_path
from raytune.model.files.pretrained import load_config
from raytune.model.load import load_model
from raytune.model.parts.quantize import quantized_modules
from raytune.plan.model.base_model import DEMO, DEMO_BASE, model_files
from raytune.plan.run_plan import ModelPlan
from tests.tiny import save_tiny_model, tiny_model, tiny_plan

CPU = torch.device("cpu")
FULL = FullAdapter(method="full")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def model_plan(path: Path, **changes: Any) -> ModelPlan:
    return tiny_plan(model={"path": str(path), **changes}).model


def quantised(**values: Any) -> dict[str, Any]:
    return {"quantization": Quantization(**values).model_dump()}


def changed_config(base: Path, folder: Path, **values: Any) -> Path:
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def test_the_tokenizer_of_the_built_in_base_is_what_transformers_makes_of_its_files() -> None:
    ours, theirs = load_tokenizer(DEMO), AutoTokenizer.from_pretrained(DEMO_BASE)
    assert type(ours) is type(theirs)
    assert ours.init_kwargs == theirs.init_kwargs
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.chat_template == theirs.chat_template


def test_a_base_is_the_demo_a_folder_or_a_hub_id(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model_path("demo", None) == "demo"
    assert model_files("demo") == str(demo_base_path())
    monkeypatch.chdir(base.parent)
    assert resolve_model_path(base.name, None) == str(base)
    assert resolve_model_path("meta-llama/Llama-3.2-1B", "main") == "meta-llama/Llama-3.2-1B"


@pytest.mark.parametrize("written", ["./nowhere", "/nowhere/model", "a/b/c"])
def test_a_path_without_a_folder_is_refused(written: str) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        resolve_model_path(written, None)


def test_a_folder_with_pickles_only_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copy(base / "config.json", tmp_path)
    torch.save(tiny_model().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, which are pickles"):
        resolve_model_path(str(tmp_path), None)
    with pytest.raises(ModelError, match="safetensors"):
        load_model(model_plan(tmp_path), FULL, device=CPU, seed=0)


def test_an_adapter_as_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="raytune merge"):
        resolve_model_path(str(tmp_path), None)


def test_a_hub_model_without_network_says_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"(?s)owner/name at revision abc.*hf download"):
        load_model(model_plan(Path("owner/name"), revision="abc"), FULL, device=CPU, seed=0)
    with pytest.raises(ModelError, match=r"no usable tokenizer at 'owner/name'"):
        load_tokenizer("owner/name")


def test_code_that_comes_with_a_model_is_refused(base: Path, tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    folder = changed_config(base, tmp_path / "evil", auto_map=auto_map, model_type="of_its_own")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_config(str(folder))
    assert not (tmp_path / "ran").exists()


def test_code_that_transformers_does_not_need_is_ignored(base: Path, tmp_path: Path) -> None:
    folder = changed_config(base, tmp_path / "evil", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert type(load_model(model_plan(folder), FULL, device=CPU, seed=0)).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_a_quantised_base_is_refused(base: Path, tmp_path: Path) -> None:
    folder = changed_config(base, tmp_path / "gptq", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="already quantised by gptq"):
        load_model(model_plan(folder), LoraAdapter(), device=CPU, seed=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_full_model_is_ready_to_train(base: Path, dtype: str) -> None:
    model = load_model(model_plan(base, dtype=dtype, gradient_checkpointing=True), FULL, device=CPU, seed=0)
    assert model.training
    assert model.is_activation_checkpointing
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {{"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]}
    assert model.config.use_cache is False


@pytest.mark.parametrize(
    "held",
    [
        {},
        quantised(),
        quantised(format="fp4", double_quantization=False),
        quantised(format="int8"),
        quantised(quant_storage="uint8"),
    ],
    ids=["lora", "nf4", "fp4", "int8", "uint8-storage"],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_adapters_get_gradients_on_the_cpu_however_the_base_is_held(base: Path, held: dict[str, Any], dtype: str) -> None:
    plan = model_plan(base, dtype=dtype, compute_dtype=dtype, gradient_checkpointing=True, **held)
    model = load_model(plan, LoraAdapter(), device=CPU, seed=0)
    model(input_ids=torch.arange(30)[None], use_cache=False).logits.float().pow(2).mean().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained.values())
    # The head of this model is tied to its embedding and never quantised.
    assert len(quantized_modules(model)) == (14 if held else 0)


def test_packed_numbers_in_another_dtype_than_the_model_are_refused(base: Path) -> None:
    with pytest.raises(ModelError, match="destroy the packed 4-bit numbers"):
        load_model(model_plan(base, dtype="bf16", **quantised(quant_storage="fp32")), LoraAdapter(), device=CPU, seed=0)


class Taken:
    """Weights of which a share is asked."""

    def __init__(self) -> None:
        self.parameters: list[torch.nn.Parameter] = []
        self.at_end = 0

    def keep_share(self, parameter: torch.nn.Parameter) -> None:
        self.parameters.append(parameter)

    def loaded(self, model: torch.nn.Module) -> None:
        self.at_end = len(self.parameters)


def test_shares_are_taken_of_each_weight_of_a_base_once_as_it_is_loaded(base: Path) -> None:
    shares = Taken()
    model = load_model(model_plan(base, **quantised()), LoraAdapter(), device=CPU, seed=0, shares=shares)
    of_base = [parameter for name, parameter in model.named_parameters() if ".lora_" not in name]
    assert sorted(map(id, shares.parameters)) == sorted(map(id, of_base))
    assert shares.at_end == len(of_base)


def test_liger_on_a_cpu_is_refused(base: Path) -> None:
    with pytest.raises(ModelError, match=r"training\.liger"):
        load_model(model_plan(base, liger=True), FULL, device=CPU, seed=0)


def test_neftune_is_the_rule_of_transformers_for_one_document_and_silent_in_evaluation(base: Path) -> None:
    model = load_model(model_plan(base, neftune_noise_alpha=5.0), FULL, device=CPU, seed=0)
    plain = tiny_model().train()
    embedding = plain.get_input_embeddings()
    embedding.neftune_noise_alpha = torch.tensor(5.0)
    embedding.register_forward_hook(neftune_post_forward_hook)
    ids = torch.arange(20)[None]
    torch.manual_seed(7)
    ours = model(input_ids=ids, use_cache=False).logits
    torch.manual_seed(7)
    theirs = plain(input_ids=ids, use_cache=False).logits
    # The noise is added in another place, hence rounded once more.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    model.eval()
    torch.testing.assert_close(model(ids).logits, tiny_model().eval()(ids).logits, rtol=0, atol=1e-5)


def test_neftune_noise_follows_the_length_of_each_document(base: Path) -> None:
    model: Any = load_model(model_plan(base, neftune_noise_alpha=5.0), FULL, device=CPU, seed=0)
    nothing = torch.zeros(0, dtype=torch.long)
    batch = Batch(
        input_ids=torch.randint(0, 250, (1, 68), generator=torch.Generator().manual_seed(1)),
        position_ids=torch.cat([torch.arange(4), torch.arange(64)])[None],
        cumulative_lengths=torch.tensor([0, 4, 68], dtype=torch.int32),
        max_document_length=64,
        target_positions=nothing,
        target_ids=nothing,
        num_targets_in_step=0,
        rows=(),
    )
    noisy: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: noisy.append(output))
    torch.manual_seed(0)
    model(**model_inputs(batch, "varlen"))
    noise = (noisy[0] - model.get_input_embeddings().weight[batch.input_ids]).abs()[0]
    bound = 5.0 / (32 * torch.tensor([4.0, 64.0])).sqrt()
    assert bound[0] * 0.9 < noise[:4].max() <= bound[0] * 1.001
    assert bound[1] * 0.9 < noise[4:].max() <= bound[1] * 1.001
