"""Liger's kernels = transformers' own modules, family by family: on a GPU as they are, else in Triton's interpreter.

They are skipped where liger-kernel and Triton are not installed (raytune's extra gpu).
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from raytune.plan.choosing.fused_kernels import HELD_AGAINST_TRANSFORMERS, OTHERS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (find_spec("liger_kernel") and find_spec("triton")), reason="needs liger-kernel and Triton"),
]
IN_FP32 = 1e-6
"""Of logits, relative: sums in another order."""
OF_A_PARAMETER = 5e-5
"""Of each parameter's gradient: where norms stand around a block as well (GLM-4), it is a small difference of large sums, and
those of fp32 differ by 1e-7 each."""


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Of all families, in a process of its own."""
    environment = dict(os.environ) | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    program = [sys.executable, "-m", "tests.numerics.liger_kernels", *HELD_AGAINST_TRANSFORMERS]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", HELD_AGAINST_TRANSFORMERS)
def test_a_family_with_fused_kernels_is_what_transformers_has(family: str, measured: dict[str, Any]) -> None:
    of_logits, of_gradients, parts = measured["differences"][family]
    assert of_logits <= IN_FP32
    assert of_gradients <= OF_A_PARAMETER
    assert {*parts} == {"GLU" if part.endswith("GLU") else part for part in HELD_AGAINST_TRANSFORMERS[family]}


def test_the_plan_knows_every_text_model_that_the_package_has_kernels_for(measured: dict[str, Any]) -> None:
    known, ours = {*measured["known"]}, {*HELD_AGAINST_TRANSFORMERS, *OTHERS}
    assert ours <= known
    seeing = {"gemma3", "gemma4", "internvl", "llama4", "llava", "mllama", "mllama_text_model", "paligemma", "pixtral", "smolvlm"}
    seeing |= {name for name in known if "vl" in name or name.startswith("glm4v")}
    with_text_inside = {"qwen3_5", "qwen3_5_moe"}
    assert known - ours == seeing | with_text_inside
