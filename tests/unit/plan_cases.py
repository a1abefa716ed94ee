"""Machines, shapes and data that tests of the plan share."""

from typing import Any

from raytune.config.sections.run import RunConfig
from raytune.plan.choosing.choose import choose_plan
from raytune.plan.choosing.setting import settle
from raytune.plan.facts.data_facts import DataFacts
from raytune.plan.facts.machine import Machine
from raytune.plan.model.architectures import model_shape
from raytune.plan.model.base_model import read_model_shape
from raytune.plan.model.shapes import ModelShape
from raytune.plan.run_plan import RunPlan, StorePlan
from raytune.units import GIB

CPU = Machine(
    num_nodes=1,
    num_cpus=4,
    host_memory_bytes=16 * GIB,
    num_gpus=0,
    gpu_name=None,
    gpu_memory_bytes=None,
    supports_bf16=True,
    attention=("varlen", "sdpa", "eager"),
)


def gpus(num_gpus: int, memory_gib: int = 80, num_nodes: int = 1, *, host_gib: int = 1000, supports_bf16: bool = True) -> Machine:
    """A cluster of GPUs with FlashAttention 2."""
    return Machine(
        num_nodes=num_nodes,
        num_cpus=16 * num_gpus,
        host_memory_bytes=host_gib * GIB,
        num_gpus=num_gpus,
        gpu_name="Test GPU",
        gpu_memory_bytes=memory_gib * GIB,
        supports_bf16=supports_bf16,
        attention=("flash_attention_2", "varlen", "flex_attention", "sdpa", "eager"),
    )


DEMO = read_model_shape("demo")
LLAMA_3_70B = model_shape(
    {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "Llama-3-70B",
)
LLAMA_3_8B = model_shape(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "Llama-3-8B",
)


def data(num_rows: int = 1000, *, validation: tuple[str, ...] = (), row_length: int = 2048) -> DataFacts:
    """Stores whose rows are full, a third of it targets."""

    def store(name: str, rows: int) -> StorePlan:
        tokens = rows * row_length
        return StorePlan(name=name, path=f"/stores/{name}", num_rows=rows, num_tokens=tokens, num_targets=tokens // 3)

    return DataFacts(
        train=store("train", num_rows),
        validation=tuple(store(name, 50) for name in validation),
        longest_document=row_length,
        template="{{ messages }}",
    )


def config(**sections: Any) -> RunConfig:
    """A config from nested dicts, as a YAML file would give it."""
    return RunConfig.model_validate(sections)


def planned(machine: Machine = CPU, shape: ModelShape = DEMO, facts: DataFacts | None = None, **sections: Any) -> RunPlan:
    """The plan of a config given as nested dicts."""
    asked = config(**sections)
    setting = settle(asked, shape, machine)
    return choose_plan(setting, facts or data(), model_path="/models/base", storage="/runs")
