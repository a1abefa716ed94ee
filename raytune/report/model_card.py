"""The model card of a finished run: a README.md in the folder of its model, as the Hugging Face hub reads it.

A view over the run folder, which computes nothing. It is made to be given away: it holds no credential, no host and no folder of
the machine, and what users wrote stands in it as text. The license of a base is told where the base's own files tell it.
"""

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

from raytune.config.load import asked_values
from raytune.config.sections.run import RunConfig
from raytune.config.yaml_nodes import write_yaml
from raytune.credentials import redacted
from raytune.launch.state.outcome import test_in_words
from raytune.metrics.json_numbers import encode_number
from raytune.model.card import Loading, is_ours, signed
from raytune.model.files.base_content import COMMIT
from raytune.plan.data.data_report import report_table
from raytune.plan.describe import plan_table
from raytune.plan.model.base_model import DEMO, is_on_hub, model_files
from raytune.plan.run_plan import RunPlan
from raytune.printable import in_a_line, printable, shortened
from raytune.report.public_text import public_text, without_folders
from raytune.report.run_seen import RunSeen
from raytune.run_folder import MODEL_CARD
from raytune.storage import exists, read_bytes, read_json, write_bytes
from raytune.units import format_dollars, format_seconds

LONG_TEXT, MOST_CONFIG, MOST_LICENSE = 600, 20_000, 200_000
PRIVATE = ("name", "storage", "cluster", "tracking", "callbacks", "checkpoint", "sweep")
"""Sections of a config that say where and by whom a run was made, not what is trained."""
_OF_TRAINING = (
    *("method", "positions", "mixture", "batch", "run", "optimizer", "objective", "penalty", "teacher", "averaging", "phases"),
    *("rates", "precision", "engine", "attention"),
)
"""Lines of a plan that say what was trained."""
_ADAPTER_CONFIG = "adapter_config.json"
_DATA_FILE = re.compile(r"\.(jsonl?|ndjson|csv|tsv|txt|parquet)$", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSE = re.compile(r"^(license|license_name|license_link):\s*[\"']?([\w.:/ +-]{1,200}?)[\"']?\s*$", re.MULTILINE)
_TEXTS = {"apache-2.0": r"Apache License\s+Version 2\.0", "mit": r"\AMIT License|Permission is hereby granted, free of charge"}
"""What the texts of two licenses begin with, by the hub's names."""

_log = logging.getLogger(__name__)


def write_model_card(run: RunSeen) -> str | None:
    """Write the card of a finished run into the folder of its model, local or on an object store; one that says the same already
    is left alone, as is one that somebody has edited.

    Returns:
        The path of the card; None if the run has no model, or its README.md is somebody's own.
    """
    path = run.folder.model_card
    if run.result is None or not any(exists(f"{run.folder.model}/{name}") for name in ("config.json", _ADAPTER_CONFIG)):
        return None
    before = _text_of(path)
    if before is not None and not is_ours(before):
        _log.warning("%s was edited, or is not raytune's: it stays as it is. Remove it, and the card is written again.", path)
        return None
    text = model_card(run, before)
    if text != before:
        write_bytes(path, text.encode())
    return path


def model_card(run: RunSeen, before: str | None = None) -> str:
    """The card as text.

    Args:
        before: the card that is there, which knows the license of a base that is not here any more.
    """
    plan = run.plan
    loading = _loading(run)
    on_hub, base = _is_of_hub(plan), _base(plan)
    license_keys = _license(plan) or _license_in(before or "")
    config = run.config
    known = _names_in(run.record.config) + [(plan.model.path, base)] * ("/" in plan.model.path)

    def public(text: object, most: int = LONG_TEXT) -> str:
        return in_a_line(public_text(printable(str(text)), known), most)

    hub_data = sorted(_hub_data(config)) if config else []
    text = _template().render(
        base_model=plan.model.path if on_hub else None,
        relation="finetune" if loading.is_whole else "adapter",
        library="transformers" if loading.is_whole else "peft",
        tags=["raytune", plan.adapter.method],
        license_keys=license_keys,
        datasets=hub_data,
        results=list(_results(run)),
        name=public(run.folder.name),
        method=plan.adapter.method,
        is_whole=loading.is_whole,
        base=base,
        revision=plan.model.revision if on_hub else None,
        hashes=_hashes(plan),
        begun=time.strftime("%Y-%m-%d", time.gmtime(run.record.created)),
        sources=[public(name) for name in _sources(config)] if config else [],
        rows=[(label, public(line)) for label, line in report_table(plan.data_report)] if plan.data_report else [],
        losses=[public(line) for line in plan.data_report.template] if plan.data_report else [],
        plan_lines=[(label, public(line)) for label, line in _plan_lines(plan)],
        machines=_machines(plan),
        took=[format_seconds(run.spent.training_s), format_seconds(run.spent.total_s)],
        usd=None if run.spent.usd is None else format_dollars(run.spent.usd),
        steps=run.last_step,
        best_step=run.result.best_step if run.result else run.last_step,
        stopped=public(run.result.findings.stopped.reason) if run.result and run.result.findings.stopped else None,
        scores=[(public(change.words), *change.cells) for change in run.changes],
        tested=[public(sentence) for sentence in test_in_words(run.result.metrics)] if run.result else [],
        num_rows=[(public(suite), comparison.num_rows) for suite, comparison in run.comparisons.items()],
        symptoms=[public(symptom.words) for symptom in run.symptoms],
        notes=[public(note) for note in plan.notes],
        loading=Markup(loading.markdown),
        config_text=_config_text(config, known) if config else None,
        versions=[(name, public(version)) for name, version in sorted(run.record.versions.items())],
    )
    return signed(text)


# --- The base ----------------------------------------------------------------------------------------------------------------


def _is_of_hub(plan: RunPlan) -> bool:
    """Whether the base is that of a hub; what lies in a folder of this machine is for nobody else to find."""
    content = plan.model.content
    return COMMIT in content if content is not None else is_on_hub(plan.model.path)


def _base(plan: RunPlan) -> str:
    """The name of the base that others can know: its id on a hub, else that of its folder."""
    path = plan.model.path
    return path if _is_of_hub(plan) else without_folders(model_files(path) if path == DEMO else path)


def _hashes(plan: RunPlan) -> list[tuple[str, str]]:
    content = {} if _is_of_hub(plan) else plan.model.content or {}
    return [(Path(name).name, digest) for name, digest in content.items()]


def _license(plan: RunPlan) -> dict[str, str]:
    """What the files of the base say of its license, by the hub's keys; empty: nothing, or they are not here."""
    folder = Path(model_files(plan.model.path, plan.model.revision))
    if keys := _license_in(_beginning(folder / MODEL_CARD)):
        return keys
    for name in ("LICENSE", "LICENSE.txt"):
        text = _beginning(folder / name)
        for license_id, pattern in _TEXTS.items():
            if re.search(pattern, text):
                return {"license": license_id}
    return {}


def _license_in(card: str) -> dict[str, str]:
    """What the front matter of a card says of a license."""
    match = re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)
    keys = dict(_LICENSE.findall(match[1])) if match else {}
    return keys if "license" in keys else {}


def _beginning(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(MOST_LICENSE) if path.is_file() else ""
    except OSError:
        return ""


def _loading(run: RunSeen) -> Loading:
    plan, model = run.plan, run.plan.model
    if not exists(f"{run.folder.model}/{_ADAPTER_CONFIG}"):
        return Loading(is_whole=True, has_template=bool(plan.template), trust_remote_code=model.trust_remote_code)
    on_hub = _is_of_hub(plan)
    return Loading(
        is_whole=False,
        has_template=bool(plan.template),
        trust_remote_code=model.trust_remote_code,
        base=_base(plan),
        revision=model.revision if on_hub else None,
        num_embeddings=model.num_embeddings,
        rope=dict(model.rope.parameters) if model.rope else {},
        max_positions=model.rope.max_position_embeddings if model.rope else None,
        quantization=_bitsandbytes(plan),
        needs_raytune=read_json(f"{run.folder.model}/{_ADAPTER_CONFIG}").get("reader") == "raytune",
    )


def _bitsandbytes(plan: RunPlan) -> dict[str, object]:
    held = plan.model.quantization
    if held is None:
        return {}
    if not held.is_4_bit:
        return {"load_in_8bit": True}
    compute = plan.model.compute_dtype if held.compute_dtype == "auto" else held.compute_dtype
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": held.format,
        "bnb_4bit_use_double_quant": held.double_quantization,
        "bnb_4bit_compute_dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[compute],
    }


# --- Data, plan and scores ---------------------------------------------------------------------------------------------------


def _sources(config: RunConfig) -> list[str]:
    """Training data by the names that others know: ids of a hub, else names of files."""
    return [path if _is_hub_data(path) else without_folders(path) for path in (source.path for source in config.data.train)]


def _hub_data(config: RunConfig) -> set[str]:
    return {source.path for source in config.data.train if _is_hub_data(source.path)}


def _is_hub_data(path: str) -> bool:
    return _HUB_ID.fullmatch(path) is not None and not _DATA_FILE.search(path) and not path.startswith(".")


def _plan_lines(plan: RunPlan) -> Iterator[tuple[str, str]]:
    """Lines of the plan with their labels, also those that go on under a label of the line before."""
    label = ""
    for own, line in plan_table(plan):
        label = own or label
        if label in _OF_TRAINING:
            yield own, line


def _machines(plan: RunPlan) -> str:
    workers = plan.batch.workers
    on = f"{workers} GPU{'s' * (workers != 1)}" if plan.cluster.device == "cuda" else "CPUs"
    rented = f" ({plan.cost.num_nodes} x {plan.cost.instance})" if plan.cost else ""
    return f"{workers} worker{'s' * (workers != 1)} on {on}{rented}"


def _results(run: RunSeen) -> Iterator[dict[str, Any]]:
    """Scores of suites for the hub's index: only what is the better, the higher it is."""
    for change in run.changes:
        value = encode_number(change.tuned)
        if change.suite and change.kind == "score" and isinstance(value, float):
            yield {"suite": change.suite, "metric": change.name.rpartition("/")[2], "words": change.words, "value": value}


# --- How it was made ---------------------------------------------------------------------------------------------------------


def _config_text(config: RunConfig, known: list[tuple[str, str]]) -> str:
    """What was asked of the model, as YAML: without what says where it was made, and with files by their names alone."""
    asked = {section: value for section, value in asked_values(config).items() if section not in PRIVATE}

    def public(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: public(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [public(inner) for inner in value]
        return public_text(value, known) if isinstance(value, str) else value

    return shortened(redacted(printable(write_yaml(public(asked)) if asked else "")), MOST_CONFIG)


def _names_in(config: Any) -> list[tuple[str, str]]:
    """Paths and URLs in a config, and the names that stand for them in public."""
    if isinstance(config, Mapping):
        return [pair for value in config.values() for pair in _names_in(value)]
    if isinstance(config, list):
        return [pair for value in config for pair in _names_in(value)]
    if not isinstance(config, str) or "/" not in config or "\n" in config or _is_hub_data(config):
        return []
    return [(config, without_folders(config))]


# --- Markdown ----------------------------------------------------------------------------------------------------------------


@cache
def _template() -> Template:
    environment = Environment(
        loader=FunctionLoader(lambda name: files("raytune.report").joinpath(name).read_text(encoding="utf-8")),
        autoescape=False,  # of HTML; `_as_text` is for Markdown
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_as_text,
    )
    environment.filters |= {"yaml": _as_yaml, "fenced": _fenced}
    return environment.get_template("model_card.md")


def _as_text(value: object) -> object:
    """What stands in a template, as Markdown that shows it and obeys nothing in it."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = in_a_line(printable(redacted(value)), LONG_TEXT).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~$!#])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", lambda match: f"\\{match[0]}", text)


def _as_yaml(value: object) -> Markup:
    """A value of the front matter: JSON, which is YAML."""
    return Markup(json.dumps(redacted(printable(value)) if isinstance(value, str) else value, ensure_ascii=False))


def _fenced(text: str) -> Markup:
    """A block of code, whatever backticks are in it."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{ticks}yaml\n{text.rstrip()}\n{ticks}")


def _text_of(path: str) -> str | None:
    try:
        return read_bytes(path).decode(errors="replace")
    except FileNotFoundError:
        return None
