"""A base that is stored quantised is refused before anything starts, unless QLoRA asks for just what is stored."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from raytune.config.load import config_from, config_with
from raytune.config.sections.adapter import FullAdapter, LoraAdapter, QloraAdapter, own_quantization
from raytune.config.sections.model import Quantization
from raytune.config.sections.quantization import HeldBase
from raytune.config.sections.run import RunConfig
from raytune.errors import ModelError
from raytune.launch.cluster.host import this_machine
from raytune.launch.data.prepare import prepare
from raytune.model.load import load_model
from raytune.plan.ahead import plan_ahead
from raytune.plan.model.stored_quantization import check_stored_quantization, stored_quantization
from raytune.plan.run_plan import RunPlan
from tests.tiny import save_tiny_model, tiny_tokenizer

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FOREIGN = {
    "fp8": {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4"}},
    "compressed-tensors": {"compression_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
    "modelopt": {"text_config": {"quantization_config": {"quant_method": "modelopt"}}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def stored_in_nf4(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As such bases lie on the hub."""
    settings: Any = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    folder = tmp_path_factory.mktemp("nf4") / "base"
    AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, device_map={"": "cpu"}).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run_config(base: Path, storage: Path, **adapter: Any) -> RunConfig:
    return config_from(
        {
            "name": "run",
            "storage": str(storage),
            "model": {"base": str(base)},
            "data": {"train": {"path": "demo:train", "max_rows": 20}, "max_length": 512},
            "adapter": adapter,
            "training": {"max_steps": 2},
        }
    )


def planned(config: RunConfig) -> RunPlan:
    return prepare(config, this_machine(config.cluster), map).plan


@pytest.mark.parametrize("method", FOREIGN)
def test_the_plan_refuses_what_another_tool_quantised_and_names_it(method: str, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | FOREIGN[method]))
    for adapter in ("lora", "qlora", "full"):
        config = run_config(folder, tmp_path, method=adapter)
        rented = config_with(config, {"cluster.instance": "p5.48xlarge"})
        with pytest.raises(ModelError, match=f"(?s){folder} is already quantised by {method} .*original weights"):
            planned(config)
        with pytest.raises(ModelError, match=f"quantised by {method}"):
            plan_ahead(rented, 10_000)
    assert not (tmp_path / "stores").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_packed_weights_are_for_qlora(method: str, stored_in_nf4: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"quantised by bitsandbytes \(nf4\), which adapter\.method: {method}"):
        planned(run_config(stored_in_nf4, tmp_path, method=method))


def test_qlora_in_another_form_than_the_stored_one_is_refused_with_the_form(stored_in_nf4: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Set adapter\.quantization: nf4, adapter\.quant_storage: uint8"):
        planned(run_config(stored_in_nf4, tmp_path, method="qlora", quantization="fp4"))


def test_qlora_trains_on_the_stored_numbers_and_the_plan_says_so(stored_in_nf4: Path, tmp_path: Path) -> None:
    plan = planned(run_config(stored_in_nf4, tmp_path, method="qlora", quant_storage="uint8"))
    assert [note for note in plan.notes if "stored in nf4 by bitsandbytes" in note]
    model = load_model(plan.model, plan.adapter, device=torch.device("cpu"), seed=0)
    stored = AutoModelForCausalLM.from_pretrained(stored_in_nf4, device_map={"": "cpu"})
    name = "model.layers.1.mlp.up_proj"
    layer = model.get_submodule(f"base_model.model.{name}.base_layer")
    assert torch.equal(layer.get_parameter("weight"), stored.get_submodule(name).get_parameter("weight"))


@pytest.mark.parametrize(
    ("values", "adapter"),
    [
        (NF4 | {"bnb_4bit_use_double_quant": False}, QloraAdapter(method="qlora", quant_storage="uint8")),
        (NF4 | {"bnb_4bit_compute_dtype": "bfloat16"}, QloraAdapter(method="qlora", compute_dtype="fp16", quant_storage="uint8")),
        (NF4 | {"bnb_4bit_quant_storage": "bfloat16"}, QloraAdapter(method="qlora", quant_storage="uint8")),
        (NF4, QloraAdapter(method="qlora", quantization="int8")),
        ({"load_in_8bit": True}, QloraAdapter(method="qlora", quant_storage="uint8")),
        ({"load_in_8bit": True}, LoraAdapter(method="lora")),
        (NF4, FullAdapter(method="full")),
    ],
)
def test_each_setting_of_the_stored_form_counts(values: dict[str, Any], adapter: Any) -> None:
    held = HeldBase(quantization=own_quantization(adapter))
    with pytest.raises(ModelError, match="already quantised by bitsandbytes"):
        check_stored_quantization(stored_quantization({"quantization_config": values}), held, adapter.method, "base")


def test_int8_is_taken_as_int8() -> None:
    check_stored_quantization({"load_in_8bit": True}, HeldBase(quantization=Quantization(format="int8")), "lora", "base")
    assert stored_quantization({"model_type": "llama", "quantization_config": None}) is None
