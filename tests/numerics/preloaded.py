"""What the server that ranks are forked from imports, once per session: a rank then starts in a moment.

Besides what tests use, what DeepSpeed imports while it makes an engine. All of it is taken from the garbage collector, which
DeepSpeed calls for every engine: it would go through every object of these libraries, and copy their memory into each rank.
"""

import gc

import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.superoffload  # noqa: F401
import numpy.ma  # noqa: F401
import setuptools  # noqa: F401
import transformers.integrations.bitsandbytes  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import raytune.training.zero_engine  # noqa: F401
import tests.numerics.runs  # noqa: F401

get_checkpoint_conversion_mapping("llama")  # of all models: a thousand regular expressions, compiled once
gc.collect()
gc.freeze()
