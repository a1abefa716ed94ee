"""What a model answers to the requests of a task of lm_eval: by lm_eval's own class, around a model that is loaded."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from raytune.evaluation.generation import without_position_warnings
from raytune.evaluation.lm_eval_documents import instances_of, judge_of, said
from raytune.evaluation.questions import Question
from raytune.evaluation.suite_metrics import Given
from raytune.model.inference import Loaded
from raytune.plan.run_plan import SuitePlan


def answer_requests(loaded: Loaded, suite: SuitePlan, chunk: Mapping[int, Question]) -> dict[int, Given]:
    """What a model makes of documents of a task, and what the task makes of that. Failures are told by the metrics."""
    assert suite.task
    asked = {number: instances_of(question) for number, question in chunk.items()}
    try:
        responses = iter(_responses(loaded, suite, [instance for instances in asked.values() for instance in instances]))
        judge = judge_of(suite.task, list(chunk.values()))
        return {number: judge(chunk[number], [next(responses) for _ in instances]) for number, instances in asked.items()}
    except Exception as error:  # whatever lm_eval or functions of the task raise
        failed = f"Task {suite.task.name} fails on rows {', '.join(map(str, chunk))}: {said(error)}"
        return dict.fromkeys(chunk, Given(text="", failed=failed))


def _responses(loaded: Loaded, suite: SuitePlan, instances: list[Any]) -> Sequence[Any]:
    """To requests, which are all of one kind."""
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    # It gives a tokenizer without padding some, which others who share it would see.
    tokenizer = loaded.tokenizer if loaded.tokenizer.pad_token is not None else copy.deepcopy(loaded.tokenizer)
    batch_size = suite.batch_size if loaded.can_pad else 1
    with _tied_as_it_is(loaded.model):
        build: Any = HFLM
        asked = build(pretrained=loaded.model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    with without_position_warnings():
        return getattr(asked, instances[0].request_type)(instances, disable_tqdm=True)


@contextmanager
def _tied_as_it_is(model: Any) -> Iterator[None]:
    """Context in which weights are not tied anew, as lm_eval has it: transformers does that while it loads, and an adapter with
    a head or embeddings of its own would lose them."""
    model.tie_weights = lambda: None
    try:
        yield
    finally:
        del model.tie_weights
