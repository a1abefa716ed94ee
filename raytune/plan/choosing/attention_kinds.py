"""Which kinds of attention a device has, from facts about it and its packages; best first. Pure."""

from dataclasses import dataclass

from raytune.config.sections.model import Attention

HOPPER = 9
"""Compute capability that FlashAttention 3's kernels are written for; not a later one."""
AMPERE = 8
FLASH_3, FLASH_2 = "flash-attn-3", "flash-attn"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOption:
    name: Attention
    available: bool
    reason: str
    """Why it is chosen, or why it cannot be used."""


def attention_kinds(capability: tuple[int, int] | None, packages: frozenset[str], *, is_16_bit: bool) -> list[AttentionOption]:
    """All kinds: those that work first, in order of preference.

    Args:
        capability: of an NVIDIA GPU; None: there is none.
        packages: `FLASH_3`, `FLASH_2`, where they are installed.
        is_16_bit: whether products are in bf16 or fp16.
    """
    missing = _missing_for_flash(capability, is_16_bit)
    varlen = "PyTorch's variable-length FlashAttention" if missing is None else "one PyTorch kernel call per document"
    of_3 = missing
    if of_3 is None and capability is not None and capability[0] != HOPPER:
        of_3 = f"its kernels are for compute capability {HOPPER}.x, this GPU has {capability[0]}.{capability[1]}"
    options = [
        _of_package("flash_attention_3", FLASH_3, of_3, packages),
        _of_package("flash_attention_2", FLASH_2, missing, packages),
        AttentionOption(name="varlen", available=True, reason=f"{varlen}; no mask, no padding"),
        AttentionOption(
            name="flex_attention",
            available=capability is not None,
            reason="compiled block mask" if capability else "PyTorch has no backward pass of it on this device",
        ),
        AttentionOption(name="sdpa", available=True, reason="dense mask over the packed row"),
        AttentionOption(name="eager", available=True, reason="dense mask and all scores in memory"),
    ]
    return sorted(options, key=lambda option: not option.available)


def _missing_for_flash(capability: tuple[int, int] | None, is_16_bit: bool) -> str | None:
    if capability is None:
        return "it runs on NVIDIA GPUs only"
    if capability[0] < AMPERE:
        return "this GPU is older than Ampere"
    return None if is_16_bit else "it computes in bf16 or fp16 only"


def _of_package(name: Attention, package: str, missing: str | None, packages: frozenset[str]) -> AttentionOption:
    if missing is None and package not in packages:
        missing = f"the package {package} is not installed"
    return AttentionOption(name=name, available=missing is None, reason=missing or f"{package} is installed")
