"""How far models with Liger's kernels are from transformers' own, as a program: on a GPU, else in Triton's interpreter, which has
to be asked for before anything imports Triton.

    TRITON_INTERPRET=1 python -m tests.numerics.liger_kernels llama qwen3
"""

import importlib
import json
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

TINY: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def prepare_kernels() -> torch.device:
    """Where they run; on a CPU with what Triton's interpreter (3.9) lacks: floats as arguments, and functions of libdevice."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    importlib.import_module("liger_kernel.transformers")
    import numpy as np
    import triton.language as tl  # pyright: ignore[reportMissingImports]
    import triton.runtime.interpreter as interpreter  # pyright: ignore[reportMissingImports]

    converted = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return converted(argument)

    interpreter._implicit_cvt = with_floats
    for name, module in list(sys.modules.items()):
        if name.startswith("liger_kernel.ops"):
            if hasattr(module, "rsqrt"):
                module.rsqrt = lambda x: tl.math.rsqrt(x)
            if hasattr(module, "tanh"):
                module.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1
    return torch.device("cpu")


def pass_of(model: nn.Module, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of a packed row, and the gradients of a loss of them."""
    model.zero_grad()
    ids = torch.arange(3, 15, device=device)[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]], device=device)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    logits.square().sum().backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return logits.detach(), gradients


def differences(family: str, device: torch.device) -> tuple[float, float, list[str]]:
    """Largest relative differences of logits and of a gradient, and which parts of a model Liger computes."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **TINY)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device).train()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    logits, gradients = pass_of(model, device)
    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, cross_entropy=False)
    replaced = {name for name, module in model.named_modules() if "liger_kernel" in module.forward.__module__}
    rotate = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    parts = {"RMSNorm"} if any("norm" in name for name in replaced) else set()
    parts |= {"GLU"} if any(name.endswith("mlp") for name in replaced) else set()
    parts |= {"RoPE"} if rotate is not None and "liger_kernel" in rotate.__module__ else set()
    new_logits, new_gradients = pass_of(model, device)
    assert gradients.keys() == new_gradients.keys()
    of_gradients = max(((gradients[name] - new_gradients[name]).norm() / gradients[name].norm()).item() for name in gradients)
    return ((logits - new_logits).abs().max() / logits.abs().max()).item(), of_gradients, sorted(parts)


def known_families() -> list[str]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # pyright: ignore[reportMissingImports]

    return sorted(MODEL_TYPE_TO_APPLY_LIGER_FN)


if __name__ == "__main__":
    device = prepare_kernels()
    found = {family: differences(family, device) for family in sys.argv[1:]}
    print(json.dumps({"known": known_families(), "differences": found}))
