"""What a run leaves behind: the best weights in Hugging Face format, base against tuned, and the result."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from raytune.evaluate.compare import Comparison, Sample, compare_exact_match
from raytune.evaluate.generation import write_answers
from raytune.evaluate.questions import Question, from_json_lines
from raytune.model.export import write_final_weights
from raytune.model.inference import load_for_generation, without_adapter
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import RunFolder
from raytune.storage import read_bytes, write_bytes, write_json
from raytune.training.checkpoint import Checkpoints
from raytune.training.engine import Engine
from raytune.training.recorder import Recorder
