"""Suites as they are planned: how base and tuned model are asked, by what they are judged, and what that takes."""

from collections.abc import Mapping
from pathlib import Path

from raytune.config.sections.evaluation import EvaluationSection, SuiteSection, is_code, suites_of
from raytune.errors import PlanError, UserError
from raytune.plan.choosing.requirements import Device
from raytune.plan.facts.machine import USABLE_SHARE, Machine
from raytune.plan.model.shapes import ModelShape
from raytune.plan.run_plan import CodePlan, SamplingPlan, SuitePlan, TaskPlan
from raytune.units import format_bytes
from raytune.user_code import read_code

TASK_FILES = (".yaml", ".py")
"""What of a task's folder says how it is asked and judged; all else in there are rows."""
MOST_TASK_BYTES = 4 << 20


def suites_plan(section: EvaluationSection) -> tuple[SuitePlan, ...]:
    """The suites that a config asks for, with the code of its user's metrics.

    Raises:
        UserError: if such code is not here.
    """
    return tuple(suite_plan(suite, key) for key, suite in suites_of(section).items())


def suite_plan(suite: SuiteSection, key: str) -> SuitePlan:
    """Args:
    key: of a config, that errors are about.
    """
    sampling = None
    if suite.temperature is not None:
        sampling = SamplingPlan(temperature=suite.temperature, top_k=suite.top_k, top_p=suite.top_p, seed=suite.seed)
    return SuitePlan(
        name=suite.title,
        kind=suite.kind,
        metrics=suite.named_metrics,
        code=_code_of(suite, key),
        bertscore=suite.bertscore,
        task=_task_of(suite, key),
        batch_size=suite.batch_size,
        max_new_tokens=suite.max_new_tokens,
        num_beams=suite.num_beams,
        sampling=sampling,
    )


def check_room(section: EvaluationSection, shape: ModelShape, machine: Machine, device: Device) -> None:
    """Refuse suites at the end of a run whose workers have no room for a whole model in 16 bits, and for the keys and values of
    what it writes; the engine is gone by then.

    Raises:
        PlanError: naming the first suite that does not fit.
    """
    if device == "cpu" or machine.gpu_memory_bytes is None:
        return
    whole, room = 2 * shape.num_parameters, int(USABLE_SHARE * machine.gpu_memory_bytes)
    for key, suite in suites_of(section).items():
        if whole > room:
            raise PlanError(
                f"{key} loads the whole model on every worker at the end ({format_bytes(whole)}), but of the GPU's memory "
                f"{format_bytes(room)} can be used. Leave {key} out.",
                keys=(key,),
            )
        cache = cache_bytes(suite, shape)
        if whole + cache > room:
            raise PlanError(
                f"{key} writes {suite.batch_size} answers at once, whose keys and values take up to {format_bytes(cache)} beside "
                f"the whole model ({format_bytes(whole)}), but of the GPU's memory {format_bytes(room)} can be used. Lower "
                f"{key}.batch_size.",
                keys=(f"{key}.batch_size", key),
            )


def cache_bytes(suite: SuiteSection, shape: ModelShape) -> int:
    """Keys and values, in 16 bits, of what a suite's longest answers add to their prompts."""
    if suite.kind not in ("answers", "lm_eval"):  # lm_eval writes as many tokens at most where a task does not say otherwise
        return 0
    per_token = 2 * 2 * shape.num_layers * shape.kv_heads * shape.head_dim
    return per_token * suite.max_new_tokens * suite.batch_size * suite.num_beams


_ASKED: Mapping[str, str] = {
    "answers": "answers of up to {suite.max_new_tokens} tokens",
    "choices": "the likeliest choice of each row",
    "labels": "the likeliest label of each row",
    "loss": "loss on general rows",
    "lm_eval": "task {suite.task.name} of lm_eval",
}


def suite_in_words(suite: SuitePlan) -> str:
    """What becomes of a suite, for the table of a plan."""
    words = _ASKED[suite.kind].format(suite=suite)
    words += f", {suite.num_beams} beams" if suite.num_beams > 1 else ""
    words += f", drawn at temperature {suite.sampling.temperature:g} (seed {suite.sampling.seed})" if suite.sampling else ""
    return f"{suite.name}: {words}; {', '.join(suite.metrics)}"


def _code_of(suite: SuiteSection, key: str) -> dict[str, CodePlan]:
    try:
        read = {name: read_code(name) for name in suite.named_metrics if is_code(name)}
    except UserError as error:
        raise UserError(str(error), keys=(f"{key}.metrics",)) from error
    return {name: CodePlan(module=code.module, name=code.name, text=code.text) for name, code in read.items()}


def _task_of(suite: SuiteSection, key: str) -> TaskPlan | None:
    if suite.kind != "lm_eval":
        return None
    assert suite.task
    assert suite.task_folder
    folder = Path(suite.task_folder).expanduser()
    keys = (f"{key}.task_folder",)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Relative paths start at the working directory.", keys=keys)
    hidden = (".", "__pycache__")
    found = [path for path in sorted(folder.rglob("*")) if path.suffix in TASK_FILES and path.is_file()]
    found = [path for path in found if not any(part.startswith(hidden) for part in path.relative_to(folder).parts)]
    if not any(path.suffix == ".yaml" for path in found):
        raise UserError(f"{folder} has no file of a task (*.yaml).", keys=keys)
    if (size := sum(path.stat().st_size for path in found)) > MOST_TASK_BYTES:
        raise UserError(
            f"{folder} holds {len(found)} files of tasks with {format_bytes(size)}, which go to every worker. Put {suite.task} "
            f"and what it includes into a folder of its own.",
            keys=keys,
        )
    try:
        files = {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in found}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The files of {folder} cannot be read: {error}.", keys=keys) from error
    return TaskPlan(name=suite.task, files=files, num_fewshot=suite.num_fewshot)
