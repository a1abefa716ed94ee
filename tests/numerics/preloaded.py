"""What the server that ranks are forked from imports, once per session: a rank then starts in a moment.

That is what DeepSpeed imports while it makes an engine, and what modules of tests import, above all pytest and Ray: a rank
imports the one whose function it calls. All of it is taken from the garbage collector, which DeepSpeed calls for every engine: it
would go through every object of these libraries, and copy their memory into each rank.
"""

import gc

from raytune.missing import TAKEN_ALONG, left_out

with left_out(*TAKEN_ALONG):  # as workers do
    import deepspeed.module_inject.auto_ep_layer
    import deepspeed.ops.op_builder.all_ops
    import deepspeed.runtime.superoffload.superoffload_stage3
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

import numpy.ma  # noqa: F401
import pytest  # noqa: F401
import setuptools  # noqa: F401
import transformers.integrations.bitsandbytes  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import raytune.launch.asking.score
import raytune.launch.rates.find_rate
import raytune.training.engines.zero_engine
import raytune.training.tasks  # noqa: F401
import tests.numerics.measured_bytes
import tests.numerics.oracles
import tests.numerics.saved_models
import tests.numerics.strategies  # noqa: F401

get_checkpoint_conversion_mapping("llama")  # of all models: a thousand regular expressions, compiled once
gc.collect()
gc.freeze()
