"""Documents of a task of lm_eval as questions of a suite, with all that is asked; and what the task makes of answers."""

import contextlib
import io
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from raytune.config.sections.evaluation import SuiteSection
from raytune.errors import DataError, UserError
from raytune.evaluation.lm_eval_tasks import AGGREGATIONS, TaskMetric, laid_out, metrics_of_task
from raytune.evaluation.questions import SHOWN_CHARACTERS, Question, ids_of
from raytune.evaluation.suite_metrics import Given
from raytune.plan.run_plan import SuitePlan, TaskPlan

_OURS = "raytune"
"""Name of a group with one task, by which lm_eval takes changes of its settings; and of the only split of documents."""
_FEWSHOT_SEED, _RANDOM_SEED, _NUMPY_SEED = 1234, 0, 1234
"""As `lm_eval.simple_evaluate` has them."""


def read_task(section: SuiteSection, key: str, suite: SuitePlan, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """The first documents of a task as questions, with all that lm_eval asks about them.

    Args:
        key: of the config, that errors are about.

    Raises:
        DataError: if lm_eval cannot read the task's rows or ask them.
        UserError: if the task is one whose answers would depend on more than the model.
    """
    assert suite.task
    task, keys = suite.task, (f"{key}.task",)
    with _seeded(), laid_out(task) as index:
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # bars of progress
                read = _load(index, task, {})
                _refuse(read, task, key)
                if task.num_fewshot is not None or read.config.num_fewshot is None:
                    read.set_config("num_fewshot", task.num_fewshot or 0)
                read.set_fewshot_seed(_FEWSHOT_SEED)
                read.build_all_requests(limit=section.max_rows, rank=0, world_size=1)
                questions = _questions(read, suite, tokenizer)
                right = [_right(questions[0], one.request_type) for one in instances_of(questions[0])]
                values = _judged(read, metrics_of_task(task), questions[0], right).values
                if missing := [name for name in suite.metrics if name not in values]:
                    raise UserError(f"Task {task.name} names the metric {missing[0]}, but gives {', '.join(values)}.", keys=keys)
        except UserError:
            raise
        except Exception as error:  # whatever a task's files or functions, or the reader of its rows, raise
            raise DataError(
                f"lm_eval cannot read or ask task {task.name} of {section.task_folder}: {said(error)}. Its rows have to be "
                f"files that this machine has (dataset_path: json, dataset_kwargs.data_files), with paths from the working "
                f"directory.",
                keys=keys,
            ) from error
    return questions


def judge_of(task: TaskPlan, questions: Sequence[Question]) -> Callable[[Question, Sequence[Any]], Given]:
    """What says of responses to the requests of one of some questions what the task makes of them."""
    with laid_out(task) as index:
        read = _load(index, task, _settings_for([_row(question) for question in questions]))
    return partial(_judged, read, metrics_of_task(task))


def instances_of(question: Question) -> list[Any]:
    """A question's requests as objects of lm_eval."""
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    row, requests = _row(question), map(json.loads, question.requests)
    return [
        Instance(request_type=kind, doc=row, arguments=tuple(arguments), idx=number)
        for number, (kind, *arguments) in enumerate(requests)
    ]


def said(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


# --- Details -----------------------------------------------------------------------------------------------------------------


def _load(index: Any, task: TaskPlan, settings: Mapping[str, Any]) -> Any:
    """The task, as an object of lm_eval.

    Args:
        settings: instead of those in its files.
    """
    return index.load({"group": _OURS, "task": [{"task": task.name, **settings}]})["tasks"][task.name]


def _settings_for(documents: Sequence[Any]) -> dict[str, Any]:
    """With which a task needs no rows but some that it has read before."""
    from datasets import Dataset

    return {
        "custom_dataset": lambda **_: {_OURS: Dataset.from_list([dict(one) for one in documents])},
        "test_split": _OURS,
        "validation_split": None,
        "training_split": None,
        "fewshot_split": None,
        "fewshot_config": None,
        "process_docs": None,
        "num_fewshot": 0,
    }


def _refuse(read: Any, task: TaskPlan, key: str) -> None:
    drawn = read.config.generation_kwargs or {}
    reasons = {
        "asks with pictures or sounds": read.config.doc_to_image or read.config.doc_to_audio,
        "is marked as one that runs what a model writes (unsafe_code)": read.config.unsafe_code,
        "asks each row several times (repeats)": read.config.repeats != 1,
        "draws its answers (do_sample, temperature), which would depend on batches": (
            drawn.get("do_sample") or drawn.get("temperature")
        ),
    }
    if reason := next((words for words, holds in reasons.items() if holds), None):
        raise UserError(f"Task {task.name} {reason}, which a suite does not do.", keys=(f"{key}.task",))
    if task.num_fewshot and read.config.num_fewshot == 0:
        raise UserError(
            f"num_fewshot is {task.num_fewshot}, but task {task.name} says 0 itself, which lm_eval does not go against. Leave it "
            f"out here or there.",
            keys=(f"{key}.num_fewshot",),
        )


def _questions(read: Any, suite: SuitePlan, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    of_document: dict[int, list[Any]] = {}
    for instance in read.instances:
        of_document.setdefault(instance.doc_id, []).append(instance)
    found = []
    for _, instances in sorted(of_document.items()):
        instances.sort(key=lambda one: one.idx)
        row = instances[0].doc
        kept = json.dumps({"row": row, "multiple_input": read.multiple_input, "multiple_target": read.multiple_target})
        if instances[0].request_type != "generate_until" and not all(one.args[-1] for one in instances):
            raise ValueError(f"row {len(found)} has an empty text, target or choice, of which nothing is known")
        is_text = instances[0].request_type == "loglikelihood_rolling"
        first = str(instances[0].args[0])
        choices = tuple(read.doc_to_choice(row)) if read.OUTPUT_TYPE == "multiple_choice" else ()
        found.append(
            Question(
                suite=suite.name,
                prompt=first[:SHOWN_CHARACTERS] if is_text else first,
                prompt_ids=ids_of(tokenizer, first),
                expected="" if is_text else _expected(read, row, choices),
                choices=choices,
                document=kept,
                requests=tuple(json.dumps([one.request_type, *one.args]) for one in instances),
            )
        )
    return found


def _expected(read: Any, row: Any, choices: Sequence[str]) -> str:
    """What the row expects, in words."""
    target: Any = read.doc_to_text(row) if read.multiple_input else read.doc_to_target(row)
    targets = target if isinstance(target, list) else [target]
    return " | ".join(choices[one] if isinstance(one, int) and 0 <= one < len(choices) else str(one) for one in targets)


def _row(question: Question) -> Any:
    return json.loads(question.document)["row"]


def _right(question: Question, kind: str) -> Any:
    """An answer by which a task's functions are tried out."""
    return {"loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0}.get(kind, question.expected)


def _judged(task: Any, metrics: Mapping[str, TaskMetric], question: Question, responses: Sequence[Any]) -> Given:
    """What a task makes of the answers to what was asked about a document, by all of its metrics that are sums."""
    kept, instances = json.loads(question.document), instances_of(question)
    task.multiple_input, task.multiple_target = kept["multiple_input"], kept["multiple_target"]
    for instance, response in zip(instances, responses, strict=True):
        instance.resps.append(response)
    task._instances = instances
    task.apply_filters()
    filters = list(instances[0].filtered_resps)
    values: dict[str, Any] = {}
    for name in filters:
        judged = task.process_results(kept["row"], [one.filtered_resps[name] for one in instances])
        values |= {f"{metric},{name}" if len(filters) > 1 else metric: value for metric, value in judged.items()}
    summed = {name: one.aggregation for name, one in metrics.items() if one.put_together_by in AGGREGATIONS}
    return Given(
        **_shown(question, instances[0].request_type, responses),
        values={name: how.of_document(values[name]) for name, how in summed.items() if name in values},
    )


def _shown(question: Question, kind: str, responses: Sequence[Any]) -> dict[str, Any]:
    """What a model answered, for samples."""
    if kind == "generate_until":
        return {"text": responses[0]}
    numbers = tuple(float(one[0] if kind == "loglikelihood" else one) for one in responses)
    if question.choices:
        of_choices = numbers[: len(question.choices)]
        return {"text": question.choices[of_choices.index(max(of_choices))], "numbers": numbers}
    return {"text": f"log-likelihood {numbers[0]:.4f}", "numbers": numbers}


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Context in which rows are drawn as lm_eval draws them, whatever was drawn before; and which leaves no trace."""
    before, of_numpy = random.getstate(), np.random.get_state()
    random.seed(_RANDOM_SEED)
    np.random.seed(_NUMPY_SEED)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(of_numpy)
