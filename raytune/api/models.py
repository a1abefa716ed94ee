"""Verbs of saved models as functions: what they are worth, what they answer, and what is made of them."""

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from raytune.api.asked import File, files_of
from raytune.errors import UserError
from raytune.units import parse_size

if TYPE_CHECKING:
    from raytune.config.sections.training import Precision
    from raytune.evaluation.side_by_side import Evaluation
    from raytune.launch.asking.generate import Answers, Prompt
    from raytune.launch.asking.models_to_ask import Named
    from raytune.launch.export.export import Exported
    from raytune.launch.export.push import Pushed
    from raytune.plan.saved.rewriting import ExportDtype, ExportFormat
    from raytune.serving.chat import Chat
    from raytune.serving.endpoint import Endpoint


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
    from raytune.launch.asking.evaluate import evaluate, prepare_evaluation

    named = _named(model, base, adapters, template, dtype, trust_remote_code=trust_remote_code, compare=compare)
    prepared = prepare_evaluation(named, suite=_text(suite), address=address, workers=workers)
    return evaluate(prepared, _text(output))


def generate(
    model: File,
    rows: File | Sequence[File] = (),
    *,
    prompts: Sequence["Prompt"] = (),
    output: File | None = None,
    base: File | None = None,
    adapters: Mapping[str, File] | None = None,
    base_too: bool = False,
    system: str | None = None,
    as_text: bool = False,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    num_beams: int = 1,
    batch_size: int = 32,
    row_format: str = "auto",
    columns: Mapping[str, str] | None = None,
    max_rows: int | None = None,
    template: str = "auto",
    dtype: "Precision | None" = None,
    workers: int | None = None,
    address: str | None = None,
    trust_remote_code: bool = False,
) -> "Answers":
    """Have models answer rows as `raytune generate` does, on the workers of a cluster.

    Args:
        model, base, adapters, template, dtype, workers, address, trust_remote_code: as for `evaluate`.
        rows: files, globs, folders or data sets, as in `data.train`, with answers or without.
        prompts: questions that are in no file: texts, lists of turns, or rows with `messages`.
        output: a file for a line of JSON per answer, which must not be there yet; the same call goes on with one that was
            interrupted. None: answers are in the result alone.
        base_too: ask the base below other models as well.
        system: message instead of those of the rows.
        as_text: continue texts as they are, without a chat template.
        max_new_tokens: longest answer, in tokens.
        temperature, top_p, top_k, seed: how tokens are drawn; without a temperature the likeliest one is taken each time.
        num_beams: of a search for the likeliest answer.
        batch_size: answers that a worker writes at once; none depends on it.
        row_format, columns, max_rows: as in `data.train`.

    Returns:
        `rows`, each with model, file, row, prompt, `answer`, `finish` (stop or length), tokens and what the row `expected`; and
        `refused`, the rows that were not asked, with file, line and reason.

    Raises:
        raytune.errors.UserError: before anything is started, if there is no such model, or no row can be asked.
        raytune.errors.RaytuneError: if the workers failed; what was answered is kept where there is an output.
    """
    from raytune.evaluation.sampling import sampling_plan
    from raytune.launch.asking.generate import HowToAnswer, generate, prepare_answers
    from raytune.launch.data.rows_to_score import sources_of

    how = HowToAnswer(
        max_new_tokens=max_new_tokens,
        sampling=sampling_plan(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
        num_beams=num_beams,
        batch_size=batch_size,
        system=system,
        in_turns=not as_text,
    )
    named = _named(model, base, adapters, template, dtype, trust_remote_code=trust_remote_code)
    paths = [rows] if isinstance(rows, str | PathLike) else rows
    sources = sources_of([fspath(path) for path in paths], row_format, max_rows, columns)
    prepared = prepare_answers(named, sources, how, prompts=prompts, base_too=base_too, address=address, workers=workers)
    return generate(prepared, _text(output))


def chat(
    model: File,
    *,
    base: File | None = None,
    adapters: Mapping[str, File] | None = None,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    template: str = "auto",
    dtype: "Precision | None" = None,
    trust_remote_code: bool = False,
) -> "Chat":
    """Talk with models as `raytune chat` does, in this process.

    Args:
        model, base, adapters, template, dtype, trust_remote_code: as for `evaluate`; or the address of an endpoint that speaks
            OpenAI's protocol, which has models of its own (http://127.0.0.1:8000/v1; its token in RAYTUNE_API_KEY).
        system: message in front of the conversation.
        max_new_tokens, temperature, top_p, top_k, seed: as for `generate`; `chat.style` has them.

    Returns:
        A conversation: `ask(text)` waits for the answer, `stream(text)` gives it as it is written, `retry()` asks again,
        `use(name)` has another of the `models` answer, `messages` is what was said, and `save(path)` appends it as a row that can
        be trained on.
        The model is loaded when it is first asked; the end of a `with` block, or `close()`, lets go of it.

    Raises:
        raytune.errors.UserError: if there is no such model, or it has no chat template.
        raytune.errors.ClusterError: if an endpoint cannot be reached.
    """
    from raytune.evaluation.sampling import refuse_none, sampling_plan
    from raytune.launch.asking.models_to_ask import models_to_ask
    from raytune.serving.chat import Chat
    from raytune.serving.far_speaker import FarSpeaker, is_endpoint
    from raytune.serving.speaker import HeldSpeaker
    from raytune.serving.talk import Style

    sampling_plan(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)  # refuses what would draw nothing
    refuse_none("max_new_tokens", max_new_tokens)
    style = Style(max_new_tokens=max_new_tokens, temperature=temperature or 0.0, top_p=top_p, top_k=top_k, seed=seed)
    if is_endpoint(fspath(model)):
        if base or adapters or template != "auto" or dtype or trust_remote_code:
            raise UserError(f"{model} is an endpoint, which has its models: base, adapters, template and dtype are its own.")
        far = FarSpeaker(fspath(model))
        return Chat(far, next(iter(far.models)), style=style, system=system)
    to_ask = models_to_ask(_named(model, base, adapters, template, dtype, trust_remote_code=trust_remote_code))
    speaker = HeldSpeaker(to_ask)
    first = to_ask.without_base().subjects[0].name
    speaker.refuse_speechless(first)
    return Chat(speaker, first, style=style, system=system)


def serve(
    model: File,
    *,
    adapters: Mapping[str, File] | None = None,
    base: File | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    replicas: int = 1,
    max_batch: int = 32,
    max_waiting: int = 256,
    timeout_s: float = 600.0,
    adapters_in: Sequence[File] = (),
    template: str = "auto",
    dtype: "Precision | None" = None,
    address: str | None = None,
    trust_remote_code: bool = False,
) -> "Endpoint":
    """Serve models as `raytune serve` does: an endpoint in OpenAI's form. Returns once it answers.

        with raytune.serve("runs/support-bot") as endpoint:
            client = openai.OpenAI(base_url=endpoint.url, api_key=endpoint.token)

    Args:
        model: the folder of a finished run, or any folder that plain transformers or PEFT loads.
        adapters: more over the same base, by name.
        base: that an adapter in `model` is laid over.
        host: where to listen.
        port: 0: any that is free.
        token: that whoever asks has to know. By default a new one, as long as only this machine is listened to.
        replicas: processes that hold the models.
        max_batch: answers that a replica writes at once.
        max_waiting: that wait in each replica; more are refused with 429.
        timeout_s: of one answer.
        adapters_in: folders that adapters may be loaded from at run time.
        template, dtype, address, trust_remote_code: as for `evaluate`.

    Returns:
        `url`, `token`, `models` (names) and `close()`; a context manager that closes.

    Raises:
        raytune.errors.UserError: before anything is started, if a model cannot be had, or strangers could use the endpoint.
        raytune.errors.RaytuneError: if the replicas did not become ready.
    """
    from raytune.serving.endpoint import ServeOptions, prepare_serving, start_serving

    named = _named(model, base, adapters, template, dtype, trust_remote_code=trust_remote_code)
    options = ServeOptions(
        host=host,
        port=port,
        replicas=replicas,
        max_batch=max_batch,
        max_waiting=max_waiting,
        timeout_s=timeout_s,
        adapters_in=tuple(fspath(folder) for folder in adapters_in),
        address=address,
    )
    return start_serving(prepare_serving(named, options, token))


def merge(
    adapters: File | Sequence[File],
    output: File,
    *,
    weights: Sequence[float] | None = None,
    combination: str | None = None,
    density: float | None = None,
    seed: int | None = None,
    rank: int | None = None,
    majority_sign: str | None = None,
    as_adapter: bool = False,
    base: File | None = None,
    dtype: "Precision | None" = None,
    original_base: bool = False,
    any_base: bool = False,
    trust_remote_code: bool = False,
    max_shard: str = "5GiB",
) -> str:
    """Merge adapters into their base as `raytune merge` does, shard by shard.

    Args:
        adapters: a folder, or several, which are combined first.
        output: folder for the result; new or empty.
        weights: of several adapters; by default equal shares of 1.
        combination: how several become one, in PEFT's words; by default "cat", the exact weighted sum of what they add.
        density: of TIES, DARE and pruning: share of the numbers that is kept.
        seed: of DARE: of the numbers that are dropped by chance.
        rank: of the result of kinds that end in svd.
        majority_sign: of TIES: "total" or "frequency".
        as_adapter: write an adapter that plain PEFT loads, not a whole model.
        base: a folder, a hub id, or "demo", if not the one that the adapters name.
        dtype: of the result; by default that of the base.
        original_base: of QLoRA: merge into the original weights, not into the quantised ones that training saw.
        any_base: merge though the base's files are not those that the adapters were trained on.
        trust_remote_code: run the Python code that comes with the base.
        max_shard: size of a file of weights at most.

    Returns:
        The path of the folder.

    Raises:
        raytune.errors.UserError: before anything is written, if adapters, base and options do not go together.
        raytune.errors.RaytuneError: if there is no room.
    """
    from raytune.model.merging.combine import merge_adapters
    from raytune.plan.saved.combination import asked_combination

    folders = [Path(folder) for folder in files_of(adapters)]
    asked = asked_combination(len(folders), combination, weights, density, seed, rank, majority_sign)
    merge_adapters(
        folders,
        Path(output),
        asked,
        as_adapter=as_adapter,
        base=_text(base),
        dtype=dtype,
        dequantise=not original_base,
        any_base=any_base,
        trust_remote_code=trust_remote_code,
        max_shard_bytes=parse_size(max_shard),
    )
    return fspath(Path(output).resolve())


def export(
    model: File,
    output: File,
    *,
    format: "ExportFormat" = "safetensors",
    dtype: "ExportDtype | None" = None,
    converter: File | None = None,
    calibration: File | None = None,
    num_rows: int | None = None,
    base: File | None = None,
    original_base: bool = False,
    any_base: bool = False,
    trust_remote_code: bool = False,
    max_shard: str = "5GiB",
) -> "Exported":
    """Write a model as files that others load, as `raytune export` does.

    Args:
        model: the folder of a finished run, of a whole model, or of an adapter, which is merged into its base first.
        output: folder for the files; new or empty.
        format: "safetensors", "gguf" or "awq-ready".
        dtype: of the weights; "q8_0" for GGUF; by default as they are stored, for "awq-ready" in 16 bits.
        converter: `convert_hf_to_gguf.py` of your llama.cpp, to write a GGUF that raytune does not.
        calibration: rows for "awq-ready", as in `data.train`; by default the training rows of the run.
        num_rows: of these, at most; by default 512.
        base, original_base, any_base, trust_remote_code, max_shard: as for `merge`.

    Returns:
        `path`, `files` with their bytes, and `notes`: what a user should know of them.

    Raises:
        raytune.errors.UserError: before anything is written, if the model cannot be written in the format.
        raytune.errors.RaytuneError: if there is no room.
    """
    from raytune.launch.export.export import ExportOptions, export

    options = ExportOptions(
        format=format,
        dtype=dtype,
        max_shard_bytes=parse_size(max_shard),
        base=_text(base),
        dequantise=not original_base,
        any_base=any_base,
        trust_remote_code=trust_remote_code,
        converter=_text(converter),
        calibration=_text(calibration),
        num_rows=num_rows,
    )
    return export(fspath(model), Path(output), options)


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
    from raytune.launch.export.push import PushOptions, push
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


def _named(
    model: File,
    base: File | None,
    adapters: Mapping[str, File] | None,
    template: str,
    dtype: "Precision | None",
    *,
    trust_remote_code: bool,
    compare: File | None = None,
) -> "Named":
    from raytune.launch.asking.models_to_ask import Named

    return Named(
        model=fspath(model),
        base=_text(base),
        adapters={name: fspath(path) for name, path in (adapters or {}).items()},
        compare=_text(compare),
        template=template,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )


def _text(path: File | None) -> str | None:
    return None if path is None else fspath(path)
