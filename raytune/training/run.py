"""The policy of a run, on every rank: where it starts, what is done after which step, and what it leaves behind."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from raytune.data.batches import Batch, evaluation_batches, step_batches
from raytune.data.store import Store
from raytune.evaluate.perplexity import bits_per_byte, perplexity
from raytune.metrics import MetricsWriter
from raytune.model.load import load_tokenizer
from raytune.plan.run_plan import RunPlan, StorePlan
from raytune.run_folder import RunFolder
from raytune.storage import write_json
from raytune.training.checkpoint import Checkpoints
from raytune.training.engine import Engine
from raytune.training.answers import compare_answers
from raytune.training.final_model import write_final_model
from raytune.training.loop import StepResult, evaluate_loss, training_steps
from raytune.training.losses import LossLayer, attach_loss
from raytune.training.schedule import learning_rate
from raytune.training.start import start_engine
from raytune.training.timetable import Timetable
