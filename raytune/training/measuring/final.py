"""What a run leaves behind: the best weights in Hugging Face format, answers of base and tuned model, and the result."""

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from raytune.data.templates.tokenizers import load_tokenizer, with_tokens
from raytune.errors import RaytuneError
from raytune.metrics.json_numbers import encode_number
from raytune.model.adapters import adapting
from raytune.model.files.base_content import save_content
from raytune.model.files.export import save_adapter, save_model
from raytune.model.files.stopping import save_generation_config, stopping_config
from raytune.model.parts.dtypes import DTYPES
from raytune.model.parts.rope import save_rope
from raytune.plan.run_plan import RunPlan
from raytune.run_folder import MODEL_CARD
from raytune.storage import file_sizes, is_local, local_path, upload_folder, write_json
from raytune.training.checkpoints.checkpoint import Checkpoints
from raytune.training.checkpoints.peers import Peers, gather_in_own_group
from raytune.training.engines.engine import Engine
from raytune.training.measuring.suites import compare_suites
from raytune.training.start.start import Started
from raytune.training.steps.recorder import Recorder, peak_memory_bytes
from raytune.training.steps.stopping import Findings
from raytune.training.steps.validation import HeldOut

PATIENCE_S = 12 * 3600.0
"""How long ranks wait for each other at the end, where rank 0 writes a whole model and may upload it. A rank that dies is noticed
at once, whatever this says."""


def finish(started: Started, checkpoints: Checkpoints, recorder: Recorder, findings: Findings) -> None:
    """Export the best checkpoint, measure it on the test, compare it with the base, and write the result. Every rank calls it
    after the last step.

    Loss and engine are released before base and tuned model are loaded, so that these have the device to themselves: the caller
    holds no other reference to the model. The result also says what was measured of what the plan had counted: what each rank
    held of model and optimizer until then, the most that its process held while it trained, and the seconds of a step.
    """
    plan, engine, folder = started.plan, started.engine, started.folder
    peers = Peers(engine.rank, gather_in_own_group(engine.world_size, PATIENCE_S), RaytuneError)
    peak_bytes = peak_memory_bytes(engine.device)
    held = {"node": os.uname().nodename, **asdict(engine.held_bytes()), "peak": peak_bytes}
    newest, best = checkpoints.wait(), checkpoints.best()
    checkpoints.release()
    assert newest is not None
    assert best is not None, "the last step is always saved"
    if best.step != newest.step:
        started = started.of_state(best.step, newest.step)
        checkpoints.load(best, started.engine)
    engine = started.engine
    test = HeldOut.test(plan, engine, started.loss.cross_entropy)
    tested = test.measure() if test else {}
    started.loss.release()
    with engine.averaged():
        peers.together(lambda: write_model(plan, engine, folder.model))
    held_by_ranks = engine.gather_objects(held)
    engine.release()
    comparisons = compare_suites(plan, engine, peers, folder) if plan.evaluation.suites else {}
    if engine.rank == 0:
        write_json(
            folder.result,
            {
                "best_step": best.step,
                **findings.to_json(),
                "metrics": {name: encode_number(value) for name, value in (recorder.metrics | best.metrics | tested).items()},
                "held_bytes": held_by_ranks,
                "median_step_s": recorder.median_step_s,
                "comparisons": {name: comparison.to_json() for name, comparison in comparisons.items()},
                "model_files": {name: size for name, size in file_sizes(folder.model).items() if name != MODEL_CARD},
            },
        )


def write_model(plan: RunPlan, engine: Engine, path: str) -> None:
    """Write the weights that the engine holds as a model that plain transformers or PEFT load. Every rank calls it.

    Weights are saved in the dtype that the forward pass used, an adapter in fp32, which PEFT expects.

    Args:
        path: folder or URL, of the storage.
    """
    state = engine.model_state(DTYPES[plan.precision]) if adapting(plan.adapter).is_whole else engine.trainable_state()
    try:
        if engine.rank == 0:
            _write_files(plan, engine.model, state, path)
    finally:
        deque(state, maxlen=0)  # gathering a parameter takes all ranks, also where rank 0 could not write the one before


def _write_files(plan: RunPlan, model: Any, state: Iterator[tuple[str, Tensor | None]], path: str) -> None:
    """Write config, weights, the tokenizer with the template that was trained, and where the model stops.

    Args:
        model: a PreTrainedModel, or a PeftModel around one.
        state: its parameters by name; of an adapted model the trained ones.
    """
    tensors = ((name, tensor) for name, tensor in state if tensor is not None)
    with TemporaryDirectory() as scratch:
        target = local_path(path) if is_local(path) else Path(scratch)
        if adapting(plan.adapter).is_whole:
            save_model(model, tensors, target)
        else:
            save_adapter(model, dict(tensors), target)
            save_rope(plan.model.rope, target)
            if plan.model.content is not None:
                save_content(plan.model.content, target)
        tokenizer = load_tokenizer(plan.model.path, plan.model.revision, plan.model.trust_remote_code)
        tokenizer = with_tokens(tokenizer, plan.model.new_tokens)
        tokenizer.chat_template = plan.template or tokenizer.chat_template
        tokenizer.save_pretrained(target)
        # Not set on the model itself: its base may be kept for a run with another template.
        save_generation_config(stopping_config(model.generation_config, tokenizer, plan.template), target)
        if not is_local(path):
            upload_folder(target, path)
