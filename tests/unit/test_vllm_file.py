"""The file by which Ray Serve starts vLLM: in the words of Ray's own schema, with as many GPUs as a model takes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
from ray.serve.schema import ServeDeploySchema

from raytune.errors import PlanError, UserError
from raytune.launch.asking.models_to_ask import Named
from raytune.plan.costs.hardware import load_catalogue
from raytune.plan.model.base_model import read_model_shape
from raytune.plan.run_plan import RopePlan
from raytune.plan.saved.asked_model import AskedModel, plain_model
from raytune.plan.saved.vllm import BESIDE_BYTES, MEMORY_SHARE, OnGpus, on_gpus, vllm_file
from raytune.serving.vllm import vllm_yaml
from raytune.units import GIB
from tests.tiny import save_tiny_model

CATALOGUE = load_catalogue()


def shape_of(folder: Path, **config: Any) -> Any:
    folder.mkdir(exist_ok=True)
    shape = {"vocab_size": 128_256, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False} | config
    text = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"} | shape
    (folder / "config.json").write_text(json.dumps(text))
    return read_model_shape(str(folder))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As Llama 3.1 70B."""
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80}
    folder = tmp_path_factory.mktemp("large")
    return shape_of(folder, hidden_size=8192, intermediate_size=28672, max_position_embeddings=131072, **heads)


def file_of(
    shape: Any, instance: str, *others: AskedModel, dtype: Any = "bf16", rank: int | None = None, rope: Any = None
) -> Any:
    node = CATALOGUE.instance(instance)
    whole = AskedModel(name="large", model=plain_model("/models/large", dtype, rope=rope))
    limits = {"replicas": 2, "max_batch": 32, "max_waiting": 100}
    return vllm_file([whole, *others], shape, rank, node, CATALOGUE.gpu_of(node), **limits)


def config_of(file: Any) -> Any:
    """As Ray reads it."""
    (app,) = ServeDeploySchema.model_validate(file).applications
    return LLMConfig.model_validate(app.args["llm_configs"][0])


def test_a_model_takes_as_many_gpus_as_its_weights_and_its_longest_text_do(large: Any) -> None:
    """70.6e9 parameters in 16 bits are 131.4 GiB, and 131,072 tokens of 320 KiB each 40 GiB."""
    gpu = CATALOGUE.gpu("H100-80GB-SXM")
    found = on_gpus(large, 2, gpu.memory_bytes, 8)
    assert found.tensor_parallel == 4
    assert found.max_length == 131072
    weights = large.num_parameters * 2
    assert weights / GIB == pytest.approx(131.4, abs=0.1)
    room = 4 * (MEMORY_SHARE * gpu.memory_bytes - BESIDE_BYTES) - weights
    assert found.cached_tokens == int(room // (2 * 80 * 8 * 128 * 2))
    two = on_gpus(large, 2, gpu.memory_bytes, 2)
    assert two == OnGpus(tensor_parallel=2, max_length=two.cached_tokens, cached_tokens=two.cached_tokens)
    with pytest.raises(PlanError, match="leave no room"):
        on_gpus(large, 2, gpu.memory_bytes, 1)


def test_ray_reads_the_file_as_it_is_meant(large: Any) -> None:
    url = "s3://bucket/adapters/terse"
    adapter = AskedModel(name="terse", model=plain_model("/models/large", "bf16"), adapter=url)
    config = config_of(file_of(large, "p5.48xlarge", adapter, rank=20))
    assert config.model_id == "large"
    assert config.accelerator_type == "H100"
    assert config.lora_config.dynamic_lora_loading_path == "s3://bucket/adapters"
    kwargs = config.engine_kwargs
    assert (kwargs["tensor_parallel_size"], kwargs["max_model_len"], kwargs["dtype"]) == (4, 131072, "bfloat16")
    assert (kwargs["enable_lora"], kwargs["max_loras"], kwargs["max_lora_rank"]) == (True, 1, 32)
    assert config.deployment_config == {"num_replicas": 2, "max_ongoing_requests": 132}
    assert config_of(file_of(large, "p5.48xlarge")).lora_config is None


@pytest.mark.parametrize("name", list(CATALOGUE.instances))
def test_every_gpu_of_the_catalogue_has_a_name_that_ray_knows(name: str, tmp_path: Path) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 2}
    small = shape_of(tmp_path / "small", hidden_size=256, intermediate_size=512, max_position_embeddings=4096, **heads)
    config = config_of(file_of(small, name, dtype="fp16"))
    assert config.engine_kwargs["tensor_parallel_size"] == 1
    assert config.engine_kwargs["max_model_len"] == 4096


def test_what_vllm_cannot_serve_is_refused_with_a_way_out(large: Any) -> None:
    local = AskedModel(name="terse", model=plain_model("/models/large", "bf16"), adapter="/runs/a/model")
    with pytest.raises(UserError, match="merge them"):
        file_of(large, "p5.48xlarge", local, rank=8)
    rope = RopePlan(parameters={"rope_type": "linear", "factor": 2.0}, original_positions=4096, max_position_embeddings=8192)
    with pytest.raises(UserError, match="stretched positions"):
        file_of(large, "p5.48xlarge", rope=rope)
    with pytest.raises(UserError, match="computes no bf16"):
        file_of(large, next(name for name, one in CATALOGUE.instances.items() if not CATALOGUE.gpu_of(one).supports_bf16))


def test_the_command_needs_to_know_the_nodes_and_writes_yaml(tmp_path: Path) -> None:
    folder = str(save_tiny_model(tmp_path / "tiny"))
    limits = {"replicas": 1, "max_batch": 8, "max_waiting": 8}
    with pytest.raises(UserError, match="--instance"):
        vllm_yaml(Named(model=folder), instance=None, **limits)
    config = config_of(yaml.safe_load(vllm_yaml(Named(model=folder), instance="p5.48xlarge", **limits)))
    assert config.model_loading_config.model_source == folder
    assert config.engine_kwargs["dtype"] == "float32"
