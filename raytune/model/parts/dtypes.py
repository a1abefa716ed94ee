"""The words of a config for precisions, as torch knows them."""

import torch

from raytune.config.sections.training import Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
