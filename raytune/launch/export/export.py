"""A run, a model or an adapter as files that others load: whole, checked, and under its name only once it is."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PretrainedConfig

from raytune.config.sections.data import DataSource
from raytune.config.sections.row_sources import trained_sources
from raytune.config.sections.training import Precision
from raytune.data.rows.split import EVERY_ROW_TRAINS
from raytune.data.store.borders import measured
from raytune.data.templates.tokenizers import load_tokenizer
from raytune.errors import ModelError, UserError
from raytune.launch.asking.score import RunToScore, run_to_score
from raytune.launch.export.calibration import save_calibration
from raytune.model.files.export import ADAPTER_CONFIG, MAX_SHARD_BYTES
from raytune.model.files.files import resolve_model_path
from raytune.model.files.pretrained import load_config
from raytune.model.files.rewriting import merging_of, rewriting_of
from raytune.model.files.saved_adapter import adapter_config
from raytune.model.files.whole_folder import refuse_taken, require_room, scratch_beside, written_whole
from raytune.model.files.whole_model import WholeModel, whole_model
from raytune.model.merging.merge import merge_adapter
from raytune.model.parts.dtypes import DTYPES
from raytune.model.parts.rope import saved_rope, stretch
from raytune.plan.data.split import asked_split
from raytune.plan.model.base_model import is_on_hub
from raytune.plan.saved.rewriting import ExportDtype, ExportFormat, Rewriting
from raytune.storage import absolute, download_folder, exists, file_sizes, is_local, local_path
from raytune.units import format_bytes

USUAL_ROWS = 512
"""That tools for AWQ and GPTQ calibrate with."""
_LAST_LINES = 15
"""Of what a converter said, in an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What is asked for beside the model and the folder."""

    format: ExportFormat = "safetensors"
    dtype: ExportDtype | None = None
    """None: as the weights are stored."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    base: str | None = None
    """Of an adapter, if not the one that it names."""
    dequantise: bool = True
    any_base: bool = False
    trust_remote_code: bool = False
    converter: str | None = None
    """Path of llama.cpp's `convert_hf_to_gguf.py`."""
    calibration: str | None = None
    """Rows, as a path in `data.train`."""
    num_rows: int | None = None
    """Of calibration, at most; None: USUAL_ROWS."""

    @property
    def weights_dtype(self) -> Precision | None:
        """Of the whole model; what a GGUF packs is cast there."""
        return None if self.format == "gguf" or self.dtype == "q8_0" else self.dtype

    def refuse_odd(self) -> None:
        """
        Raises:
            UserError: if an option is not of the format.
        """
        if self.format not in get_args(ExportFormat):
            raise UserError(f"--format is {self.format}, expected one of {', '.join(get_args(ExportFormat))}.")
        if self.dtype == "q8_0" and self.format != "gguf":
            raise UserError(f"--dtype q8_0 is a type of GGUF only, and --format is {self.format}. Take bf16, fp16 or fp32.")
        if self.dtype == "fp32" and self.format == "awq-ready":
            raise UserError("--dtype is fp32, but quantisers of AWQ and GPTQ take a model in 16 bits. Take bf16 or fp16.")
        if self.converter is not None and self.format != "gguf":
            raise UserError(f"--converter is for --format gguf only, and --format is {self.format}.")
        if self.converter is not None and not Path(self.converter).expanduser().is_file():
            raise UserError(f"--converter is {self.converter}: there is no such file. It is convert_hf_to_gguf.py of llama.cpp.")
        for name, value in (("--calibration", self.calibration), ("--rows", self.num_rows)):
            if value is not None and self.format != "awq-ready":
                raise UserError(f"{name} is for --format awq-ready only, and --format is {self.format}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written."""

    path: str
    format: str
    files: Mapping[str, int]
    """Bytes by name."""
    notes: tuple[str, ...] = ()
    """What a user should know of it, in sentences."""

    @property
    def lines(self) -> list[str]:
        total = format_bytes(sum(self.files.values()))
        count = "one file" if len(self.files) == 1 else f"{len(self.files)} files"
        return [f"exported   {self.path}  ({self.format}, {count}, {total}, read back)", *self.notes]

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "format": self.format, "files": dict(self.files), "notes": [*self.notes]}


def export(named: str, output: Path, options: ExportOptions) -> Exported:
    """Write a model in a format that others load.

    Args:
        named: folder of a finished run, of a whole model or of an adapter, which is merged first.

    Raises:
        UserError: if an option does not fit, there is no such model, or it cannot be written in the format.
        StorageFullError: if the disk has no room for it.
    """
    options.refuse_odd()
    refuse_taken(output, "what is exported")
    run = _run(named)
    _refuse_without_rows(run, options)
    with scratch_beside(output, "scratch") as scratch:
        source = _Source(named=named, run=run, options=options, scratch=scratch)
        notes = _FORMATS[options.format](source, output)
    return Exported(
        path=str(output.absolute()), format=options.format, files=file_sizes(str(output.absolute())), notes=tuple(notes)
    )


def export_need(named: str, options: ExportOptions) -> Rewriting:
    """What an export will take. Nothing is read but headers of files.

    Raises:
        UserError: as `export`, as far as that is known before.
    """
    options.refuse_odd()
    run = _run(named)
    _refuse_without_rows(run, options)
    path = run.folder.model if run else named
    if not is_local(path):
        raise UserError(f"{path} is not on this machine, so nothing tells its sizes yet. Leave out --dry-run.")
    folder = Path(local_path(path))
    dtype = next((dtype for name, dtype in DTYPES.items() if name == options.dtype), None)
    if (folder / ADAPTER_CONFIG).is_file():
        return merging_of([folder], _base(run, options), dtype, options.max_shard_bytes)
    return rewriting_of(whole_model(folder, trust_remote_code=options.trust_remote_code).weights, dtype, options.max_shard_bytes)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What is exported."""

    named: str
    run: RunToScore | None
    options: ExportOptions
    scratch: Path
    """Folder that is removed in the end."""

    @property
    def name(self) -> str:
        """For people, and for names of files."""
        if self.run:
            return self.run.folder.name
        folder = self.folder.resolve()
        return folder.parent.name if folder.name == "model" else folder.name

    @cached_property
    def folder(self) -> Path:
        """Of a model or an adapter on this machine."""
        path = self.run.folder.model if self.run else self.named
        if is_local(path):
            return Path(local_path(path))
        download_folder(path, self.scratch / "downloaded")
        return self.scratch / "downloaded"

    @property
    def is_adapter(self) -> bool:
        return (self.folder / ADAPTER_CONFIG).is_file()

    def config(self) -> PretrainedConfig:
        """Of the whole model."""
        options = self.options
        if not self.is_adapter:
            return load_config(resolve_model_path(str(self.folder), None), None, options.trust_remote_code)
        own = adapter_config(self.folder)
        base = _base(self.run, options) or own.base_model_name_or_path or str(self.folder)
        path = resolve_model_path(base, None)
        config = load_config(path, own.revision if is_on_hub(path) else None, options.trust_remote_code)
        stretch(config, saved_rope(self.folder))
        return config

    def whole(self) -> WholeModel:
        """The whole model, merged in the scratch folder if it has to be."""
        folder = self.folder
        if self.is_adapter:
            folder = self.scratch / "merged"
            self.merge(folder)
        return whole_model(folder, trust_remote_code=self.options.trust_remote_code)

    def merge(self, output: Path) -> None:
        options = self.options
        merge_adapter(
            self.folder,
            output,
            base=_base(self.run, options),
            dtype=options.weights_dtype,
            dequantise=options.dequantise,
            any_base=options.any_base,
            trust_remote_code=options.trust_remote_code,
            max_shard_bytes=options.max_shard_bytes,
        )


def _safetensors(source: _Source, output: Path) -> list[str]:
    if source.is_adapter:
        source.merge(output)  # which reads the names, shapes and formats of what it wrote
        return []
    _refuse_base(source)
    model, dtype = source.whole(), _dtype(source.options.weights_dtype)
    require_room(output, model.weights.bytes_in(dtype), "The exported model")
    with written_whole(output) as unfinished:
        model.save(unfinished, dtype, source.options.max_shard_bytes)
    return []


def _gguf(source: _Source, output: Path) -> list[str]:
    from raytune.model.gguf.gguf_file import GgufModel, check_foreign, refuse_config

    if not source.is_adapter:
        _refuse_base(source)
    options = source.options
    if options.converter is None:
        refuse_config(source.config())  # before anything is merged
    model = source.whole()
    kind = options.dtype or _stored_kind(model)
    file_name = f"{source.name}-{kind.replace('fp', 'f').upper()}.gguf"
    if options.converter is not None:
        with written_whole(output) as unfinished:
            _convert(Path(options.converter).expanduser(), model.folder, unfinished / file_name, kind)
            check_foreign(unfinished / file_name)
        return [f"{file_name} was made by {options.converter}; that it opens was looked at, not what it holds."]
    tokenizer = load_tokenizer(str(model.folder), trust_remote_code=options.trust_remote_code)
    written = GgufModel(model.weights, model.config, tokenizer, model.stops, kind, source.name)
    require_room(output, written.num_bytes, "The GGUF file")
    with written_whole(output) as unfinished:
        written.write(unfinished / file_name)
        written.check(unfinished / file_name)
    return [*written.notes]


def _awq_ready(source: _Source, output: Path) -> list[str]:
    if not source.is_adapter:
        _refuse_base(source)
    options, run = source.options, source.run
    model = source.whole()
    dtype = _dtype(options.weights_dtype) or (torch.float16 if _stored_kind(model) == "fp16" else torch.bfloat16)
    require_room(output, model.weights.bytes_in(dtype), "The model in 16 bits")
    tokenizer = load_tokenizer(str(model.folder), trust_remote_code=options.trust_remote_code)
    sources = [DataSource(path=options.calibration)] if options.calibration else [*run.config.data.train] if run else []
    split = EVERY_ROW_TRAINS
    if run is not None and not options.calibration:
        split, _ = measured(asked_split(run.config.data), trained_sources(run.config), source.scratch)
    template = "auto" if run is None or tokenizer.chat_template else run.config.data.template
    with written_whole(output) as unfinished:
        model.save(unfinished, dtype, options.max_shard_bytes)
        wanted = options.num_rows or USUAL_ROWS
        num_rows = save_calibration(sources, split, tokenizer, template, wanted, unfinished, source.scratch)
    return [f"{num_rows} texts for calibration are in calibration.jsonl; README.md says which tools take them."]


_FORMATS: Mapping[ExportFormat, Callable[[_Source, Path], list[str]]] = {
    "safetensors": _safetensors,
    "gguf": _gguf,
    "awq-ready": _awq_ready,
}


def _run(named: str) -> RunToScore | None:
    """The run that a user names, which must have finished; None: it is another folder."""
    if not exists(f"{absolute(named)}/run.json"):
        if is_local(named) and not Path(local_path(named)).is_dir():
            raise UserError(
                f"{named} is neither the folder of a run, nor that of a model or an adapter: there is no such folder."
            )
        return None
    run = run_to_score(named)
    if run.record.state != "finished":
        raise UserError(
            f"Run {run.folder.name!r} has not finished (it is {run.record.state}): only a finished run has a model that can be "
            f"exported. The same `raytune train` goes on with it."
        )
    return run


def _refuse_without_rows(run: RunToScore | None, options: ExportOptions) -> None:
    if options.format == "awq-ready" and run is None and options.calibration is None:
        raise UserError(
            "--format awq-ready needs rows to calibrate with, and this is no run, whose training rows would be taken. Name some "
            "with --calibration rows.jsonl."
        )


def _base(run: RunToScore | None, options: ExportOptions) -> str | None:
    """Of an adapter: what the user names, or the run; None: what the adapter names."""
    return options.base or (run.plan.model.path if run else None)


def _refuse_base(source: _Source) -> None:
    if source.options.base is not None:
        raise UserError(
            f"--base is {source.options.base}, but {source.named} is a whole model, which lies over none. Leave it out."
        )


def _stored_kind(model: WholeModel) -> ExportDtype:
    names: Mapping[Any, ExportDtype] = {dtype: name for name, dtype in DTYPES.items()}
    return names.get(model.config.dtype, "fp32")


def _dtype(precision: Precision | None) -> torch.dtype | None:
    return None if precision is None else DTYPES[precision]


def _convert(converter: Path, model: Path, target: Path, kind: ExportDtype) -> None:
    """Have a user's llama.cpp write a file."""
    command = [sys.executable, str(converter), str(model), "--outfile", str(target), "--outtype", kind.replace("fp", "f")]
    told = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    last = "\n".join(told.stdout.splitlines()[-_LAST_LINES:])
    if told.returncode != 0:
        raise ModelError(f"{converter} failed with exit code {told.returncode}. Its last lines:\n{last}")
    if not target.is_file():
        raise ModelError(f"{converter} left no {target.name}. Its last lines:\n{last}")
