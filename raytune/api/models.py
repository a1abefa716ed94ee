"""Verbs of saved models as functions: what they are worth, and what is made of them."""

from collections.abc import Mapping
from os import fspath
from typing import TYPE_CHECKING

from raytune.api.asked import File

if TYPE_CHECKING:
    from raytune.config.training import Precision
    from raytune.evaluation.side_by_side import Evaluation
    from raytune.launch.push import Pushed


def evaluate(
    model: File,
    *,
    suite: File | None = None,
    base: File | None = None,
    adapters: Mapping[str, File] | None = None,
    compare: File | None = None,
    output: File | None = None,
    template: str = "auto",
    dtype: "Precision | None" = None,
    workers: int | None = None,
    address: str | None = None,
    trust_remote_code: bool = False,
) -> "Evaluation":
    """Measure models on suites as `raytune evaluate` does: base against tuned, with intervals.

    Args:
        model: the folder of a finished run, or any folder that plain transformers or PEFT loads.
        suite: a YAML file with `suites`, as `evaluation.suites`; by default those of the run.
        base: that the model is compared with, or that an adapter is laid over.
        adapters: more of them over the same base, by name.
        compare: another model or run beside it on the same rows.
        output: folder for results and samples; by default `evaluations/NAME` in the run folder, or here without a run.
        template: chat template of a model whose tokenizer has none, as `data.template`.
        dtype: that a model is loaded in; by default that of its files.
        workers: that answer at once; by default as the run has, one per GPU, or one per node.
        address: of a Ray cluster, as `cluster.address`, instead of the run's; "here": one inside this machine.
        trust_remote_code: run the Python code that comes with a model in a folder.

    Returns:
        `values` of each model, `pairs` with gains and intervals, `models`, `num_rows`, and `output`, the folder.

    Raises:
        raytune.errors.UserError: before anything is started, if a model cannot be had or rows cannot be asked.
        raytune.errors.RaytuneError: if the workers failed; what was answered is kept, and the same call goes on.
    """
    from raytune.launch.evaluate import evaluate, prepare_evaluation
    from raytune.launch.models_to_ask import Named

    def text(path: File | None) -> str | None:
        return None if path is None else fspath(path)

    named = Named(
        model=fspath(model),
        base=text(base),
        adapters={name: fspath(path) for name, path in (adapters or {}).items()},
        compare=text(compare),
        template=template,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    prepared = prepare_evaluation(named, suite=text(suite), address=address, workers=workers)
    return evaluate(prepared, text(output))


def push(
    model: File,
    target: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    replace: bool = False,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> "Pushed":
    """Push a model as `raytune push` does: to a hub, a bucket or a folder, checked before and read back.

    Args:
        model: the folder of a finished run, or of a model or an adapter that plain transformers or PEFT loads.
        target: owner/name on the hub, a URL, or a folder that is written as a path.
        private: who may see a model that is new on the hub; one that is public already is refused.
        revision: branch on the hub; by default main.
        message: of the commit there.
        replace: write over files that raytune has not pushed there, and a card that was edited.
        base: what an adapter calls its base there, such as its id on a hub.
        trust_remote_code: run the Python code that comes with a model in a folder, to check it.

    Returns:
        `where`, `commit`, `files` with their bytes, `num_sent`, and `notes`.

    Raises:
        raytune.errors.UserError: before anything is sent.
        raytune.errors.RaytuneError: if the target does not answer; the same call goes on.
    """
    from raytune.launch.push import PushOptions, push
    from raytune.report.at_end import leave_card

    options = PushOptions(
        private=private,
        revision=revision,
        message=message,
        replace=replace,
        base=base,
        trust_remote_code=trust_remote_code,
    )
    return push(fspath(model), target, options, leave_card)
