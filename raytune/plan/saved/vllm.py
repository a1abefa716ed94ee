"""vLLM on Ray Serve for a model: how many GPUs it takes, how long its texts may be, and the file by which it starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune.config.sections.training import Precision
from raytune.errors import PlanError, UserError
from raytune.plan.costs.hardware import Gpu, Instance
from raytune.plan.model.base_model import is_on_hub, model_files
from raytune.plan.model.shapes import ModelShape
from raytune.plan.saved.asked_model import AskedModel
from raytune.plan.saved.served_memory import NUMBER_BYTES
from raytune.units import GIB, format_bytes

MEMORY_SHARE = 0.9
"""Of a GPU's memory that vLLM takes (its default)."""
BESIDE_BYTES = 2 * GIB
"""On each GPU, for CUDA graphs and what a pass holds: approximate, measured by nobody here."""
LEAST_LENGTH = 2048
"""Tokens of prompt and answer below which a model is not worth its GPUs."""
REMOTE = ("s3://", "gs://", "abfss://", "azure://")
"""Where Ray 2.60 loads adapters of vLLM from."""
_DTYPES: Mapping[Precision, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_ACCELERATORS = {"A100-40GB": "A100-40G", "A100-80GB": "A100-80G"}
"""Ray's names of GPUs that are not the first part of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnGpus:
    """How a model lies on GPUs of one node."""

    tensor_parallel: int
    max_length: int
    """Tokens of prompt and answer."""
    cached_tokens: int
    """That there is room for, of all requests at once."""


def on_gpus(shape: ModelShape, number_bytes: int, gpu_memory_bytes: int, num_gpus: int) -> OnGpus:
    """The fewest GPUs of a node on which texts as long as the model knows have room; else as many as help, and shorter texts.

    Raises:
        PlanError: if not even short texts have room.
    """
    best: OnGpus | None = None
    parallel = 1
    while parallel <= num_gpus:
        splits = shape.heads % parallel == 0 and (shape.kv_heads % parallel == 0 or parallel % shape.kv_heads == 0)
        if splits:
            room = parallel * (MEMORY_SHARE * gpu_memory_bytes - BESIDE_BYTES) - shape.num_parameters * number_bytes
            per_token = 2 * shape.num_layers * max(shape.kv_heads, parallel) * shape.head_dim * number_bytes
            tokens = int(room // per_token)
            if best is None or tokens > best.cached_tokens:
                best = OnGpus(tensor_parallel=parallel, max_length=min(tokens, shape.max_positions), cached_tokens=tokens)
            if tokens >= shape.max_positions:
                break
        parallel *= 2
    if best is None or best.max_length < min(LEAST_LENGTH, shape.max_positions):
        raise PlanError(
            f"The weights take {format_bytes(shape.num_parameters * number_bytes)}, and {num_gpus} GPUs with "
            f"{format_bytes(gpu_memory_bytes)} each leave no room for texts of {LEAST_LENGTH} tokens beside. Name an instance "
            f"with more memory, or serve the model in 16 bits."
        )
    return best


def vllm_file(
    models: Sequence[AskedModel],
    shape: ModelShape,
    rank: int | None,
    instance: Instance,
    gpu: Gpu,
    *,
    replicas: int,
    max_batch: int,
    max_waiting: int,
) -> dict[str, Any]:
    """A file of Ray Serve that has vLLM serve a model and adapters over it.

    Args:
        models: the base first, or one whole model.
        rank: of the largest adapter.

    Raises:
        UserError: if vLLM or Ray cannot serve them as they are.
        PlanError: if they do not fit a node.
    """
    whole, *others = models
    model = whole.model
    if what := next((what for what, value in _unlike(whole).items() if value), None):
        raise UserError(
            f"{whole.name} has {what}, which is in no file that vLLM reads. Merge it first (raytune merge), and serve the result."
        )
    if model.compute_dtype == "bf16" and not gpu.supports_bf16:
        raise UserError(f"{gpu.name} computes no bf16. Name --dtype fp16, or another instance.")
    fit = on_gpus(shape, NUMBER_BYTES[model.compute_dtype], gpu.memory_bytes, instance.num_gpus)
    engine: dict[str, Any] = {
        "tensor_parallel_size": fit.tensor_parallel,
        "max_model_len": fit.max_length,
        "dtype": _DTYPES[model.compute_dtype],
        "gpu_memory_utilization": MEMORY_SHARE,
        "max_num_seqs": max_batch,
        "trust_remote_code": model.trust_remote_code,
    }
    if model.revision:
        engine["revision"] = model.revision
    source = model.path if is_on_hub(model.path) else model_files(model.path)
    config: dict[str, Any] = {
        "model_loading_config": {"model_id": whole.name, "model_source": source},
        "accelerator_type": _accelerator(gpu.name),
        "engine_kwargs": engine,
        "deployment_config": {"num_replicas": replicas, "max_ongoing_requests": max_batch + max_waiting},
    }
    if others:
        config["lora_config"] = {
            "dynamic_lora_loading_path": _folder_of([one.adapter or "" for one in others]),
            "max_num_adapters_per_replica": len(others),
        }
        engine |= {"enable_lora": True, "max_loras": len(others), "max_lora_rank": _rank(rank or 0)}
    args = {"llm_configs": [config]}
    app = {"name": "raytune", "route_prefix": "/", "import_path": "ray.serve.llm:build_openai_app", "args": args}
    return {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": 8000}, "applications": [app]}


def _unlike(one: AskedModel) -> dict[str, object]:
    """What a model is made of beside its files."""
    model = one.model
    return {"a quantised base": model.quantization, "stretched positions": model.rope, "new tokens": model.new_tokens}


def _folder_of(adapters: Sequence[str]) -> str:
    """The folder that adapters lie in."""
    folders = {adapter.rstrip("/").rpartition("/")[0] for adapter in adapters}
    if len(folders) > 1 or not all(adapter.startswith(REMOTE) for adapter in adapters):
        raise UserError(
            f"Ray 2.60 loads adapters of vLLM from one folder on {', '.join(REMOTE)}, and these lie in "
            f"{', '.join(sorted(folders))}. Copy them there, or merge them (raytune merge) and serve the results. The embedded "
            f"engine serves them as they are."
        )
    return folders.pop()


def _rank(rank: int) -> int:
    """The least that vLLM is built for."""
    return next((least for least in (8, 16, 32, 64, 128, 256, 320, 512) if least >= rank), rank)


def _accelerator(gpu: str) -> str:
    kind, _, rest = gpu.partition("-")
    return _ACCELERATORS.get(f"{kind}-{rest.partition('-')[0]}", kind)
