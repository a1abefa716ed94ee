"""`training.liger` in a plan: which parts of which models Liger's fused kernels compute. Pure."""

from raytune.config.sections.run import RunConfig
from raytune.errors import PlanError
from raytune.plan.choosing.requirements import Device
from raytune.plan.defaults import Choice
from raytune.plan.facts.machine import Machine
from raytune.plan.model.shapes import ModelShape

PACKAGE = "liger-kernel"
_USUAL = ("RoPE", "RMSNorm", "SwiGLU")
HELD_AGAINST_TRANSFORMERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3", "phi3", "granite", "smollm3"), _USUAL),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4", "hunyuan_v1_dense"), _USUAL),
    **dict.fromkeys(("gemma", "gemma3_text"), ("RoPE", "RMSNorm", "GeGLU")),
    "glm4": ("RMSNorm", "SwiGLU"),
}
"""What liger-kernel 0.8 replaces, by transformers' model type, of families whose logits and gradients with its kernels were those
of transformers (tests/numerics/test_liger.py)."""
OTHERS = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v4", "falcon_h1", "gemma2", "gemma4_text", "gpt_oss", "hunyuan_v1_moe"),
    *("llama4_text", "mixtral", "muse_glimmer", "nemotron", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next"),
)
"""Other families that it has kernels for."""


def choose_liger(config: RunConfig, shape: ModelShape, machine: Machine, device: Device) -> Choice[bool]:
    """Whether fused kernels compute norms, rotary embeddings and gated MLPs.

    Raises:
        PlanError: if they are asked for where there are none: liger-kernel would log so and go on.
    """
    wanted, family = config.training.liger, shape.model_type
    if wanted is False:
        return Choice(False)
    is_known = family in HELD_AGAINST_TRANSFORMERS or family in OTHERS
    if wanted is True:
        if device == "cpu":
            raise PlanError("training.liger needs GPUs: its kernels are written in Triton. Set it to false.")
        if not is_known:
            raise PlanError(f"training.liger has no kernels for a {family} model and would do nothing. Set it to auto or false.")
        if family in OTHERS:
            return Choice(True, f"training.liger is true; its kernels for {family} were not held against transformers' here.")
        return Choice(True)
    if device == "cpu":
        return Choice(False)
    if why := _why_not(config, family, is_known, machine):
        return Choice(False, f"training.liger is false: {why}.")
    parts = HELD_AGAINST_TRANSFORMERS[family]
    return Choice(True, f"training.liger is true: fused kernels for {', '.join(parts)} of a {family} model.")


def _why_not(config: RunConfig, family: str, is_known: bool, machine: Machine) -> str | None:
    if machine.packages is None or PACKAGE not in machine.packages:
        is_known_to_lack = machine.packages is not None
        there = "the workers' Python does not have it" if is_known_to_lack else "whether nodes have it is not known yet"
        return f"it needs the package {PACKAGE} (raytune's extra gpu), and {there}"
    if not is_known:
        return f"{PACKAGE} has no kernels for a {family} model"
    if family in OTHERS:
        return f"{PACKAGE}'s kernels for a {family} model were not held against transformers' (true takes them all the same)"
    if config.training.compile:
        return "training.compile is true, and fuses them itself"
    if config.training.sequence_parallel_size > 1:
        return "its kernels were not tried on parts of rows (training.sequence_parallel_size)"
    return None
