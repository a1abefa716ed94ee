"""Requests and models that an engine does not take."""

from raytune.errors import UserError
from raytune.model.files.saved_adapter import changes_of_base, refuse_unfit_adapter
from raytune.plan.model.base_model import is_on_hub, model_files
from raytune.plan.saved.asked_model import AskedModel
from raytune.serving.refusals import UnfitError
from raytune.serving.requests import Request
from raytune.storage import is_local, local_path


def check_request(request: Request, vocab: int) -> None:
    """Refuse a request that makes no sense, before it meets others.

    Raises:
        UserError: naming what is wrong.
    """
    num_logprobs = request.num_logprobs
    wrong = {
        "the prompt is empty": not request.prompt,
        f"the prompt holds a token that is none of the {vocab} that the model knows": any(
            not 0 <= token < vocab for token in request.prompt
        ),
        f"max_new_tokens is {request.max_new_tokens}, and 1 is the least": request.max_new_tokens < 1,
        f"temperature is {request.temperature}, and has to be a number from 0": not 0 <= request.temperature < float("inf"),
        f"top_p is {request.top_p}, and has to be above 0 and at most 1": not 0 < request.top_p <= 1,
        f"top_k is {request.top_k}, and 1 is the least": request.top_k is not None and request.top_k < 1,
        "a text of stop is empty": not all(request.stop),
        f"num_logprobs is {num_logprobs}, and has to be from 0": num_logprobs is not None and num_logprobs < 0,
    }
    if found := [what for what, is_wrong in wrong.items() if is_wrong]:
        raise UserError(f"Request {request.id!r} cannot be answered: {'; '.join(found)}.")


def check_fit(one: AskedModel) -> None:
    """Refuse an adapter that does not fit the base, by its shapes and by the content of the base that it was trained on.

    Raises:
        ModelError: with what does not fit.
    """
    if one.adapter is None or not is_local(one.adapter):
        return
    base = one.model.path if is_on_hub(one.model.path) else model_files(one.model.path)
    if changes := changes_of_base(local_path(one.adapter), base, one.model.revision):
        raise UnfitError(
            f"The adapter in {one.adapter} was trained on another base than {one.model.path} holds now:\n{changes}\nServe it "
            f"over the base that it was trained on."
        )
    refuse_unfit_adapter(one)
