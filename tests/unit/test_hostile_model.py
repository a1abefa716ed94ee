"""Claims about model folders of strangers: whatever is in their files is a typed error or works, within a second of work."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from raytune.config.load import config_from
from raytune.data.templates.template import ChatTemplate
from raytune.data.templates.text import resolve_template
from raytune.data.templates.tokenizers import adds_bos, open_tokenizer, tokenizer_fingerprint
from raytune.errors import ModelError, RaytuneError
from raytune.model.files.base_check import check_base
from raytune.model.files.files import resolve_model_path
from raytune.model.files.pretrained import load_config
from raytune.model.files.stopping import base_config, stopping_config
from raytune.plan.ahead import plan_ahead
from raytune.plan.model.architectures import model_shape
from raytune.plan.model.base_model import read_model_shape
from raytune.plan.model.model_folder import check_numbers
from tests.tiny import save_tiny_model
from tests.variants import variants

SECONDS = 1.0
ABSURD: dict[str, Any] = {
    "negative": -1,
    "zero": 0,
    "billion": 10**9,
    "beyond 64 bits": 10**30,
    "nan": math.nan,
    "text": "7",
    "true": True,
    "null": None,
    "list": [1, 2],
    "deep": json.loads("[" * 400 + "]" * 400),
}
ADDED = {
    "config.json": [
        "head_dim", "rope_scaling", "layer_types", "quantization_config", "auto_map", "torch_dtype", "sliding_window",
        "transformers_weights", "text_config", "num_experts", "num_nextn_predict_layers",
    ],
    "generation_config.json": ["max_length", "temperature"],
    "tokenizer_config.json": ["chat_template", "model_max_length", "added_tokens_decoder", "auto_map", "tokenizer_class"],
    "tokenizer.json": ["added_tokens", "normalizer", "truncation"],
}  # fmt: skip
"""Keys that the tiny model's files lack."""
RAW: dict[str, bytes] = {
    "empty": b"",
    "garbage": bytes(range(256)),
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "a list": b"[]",
    "null": b"null",
    "a number": b"7",
    "a million brackets": b"[" * 1_000_000,
    "objects in objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "1e400": b'{"model_type": "llama", "hidden_size": 1e400}',
    "thousands of digits": b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}",
    "byte order mark": b"\xef\xbb\xbf{}",
    "an empty object": b"{}",
    "a key twice": b'{"model_type": "llama", "model_type": "gpt2"}',
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("intact"))
    use_model(folder)  # imports, and what is done once
    use_tokenizer(folder)
    return folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "model"))


def use_model(folder: Path) -> None:
    """What is done with a base's config and weights before a run starts."""
    base = str(folder)
    run = {"model": {"base": base}, "data": {"train": "a"}, "cluster": {"instance": "p5.48xlarge"}, "training": {"max_steps": 9}}
    plan_ahead(config_from(run))
    resolve_model_path(base, None)
    check_base(base, None, False)


def use_tokenizer(folder: Path) -> None:
    """What is done with its tokenizer, template and settings of generation, behind a look at the folder."""
    resolve_model_path(str(folder), None)
    tokenizer = open_tokenizer(str(folder))
    tokenizer_fingerprint(tokenizer)
    adds_bos(tokenizer)
    template = resolve_template("auto", tokenizer)
    assert ChatTemplate(tokenizer, template).stop_ids is not None
    stopping_config(base_config(folder, load_config(str(folder))), tokenizer, template)
    tokenizer("text")


def use(folder: Path) -> None:
    use_model(folder)
    use_tokenizer(folder)


def fault(call: Callable[[], None]) -> str:
    """What is wrong with how a call ended; empty if it came to its end, or to a typed error, within a second.

    One that takes longer is made again: the first may have imported what transformers imports late.
    """
    fault, took = _fault(call)
    if fault or took <= SECONDS:
        return fault
    fault, took = _fault(call)
    return fault or (f"{took:.1f} s" if took > SECONDS else "")


def _fault(call: Callable[[], None]) -> tuple[str, float]:
    """What went wrong, and seconds of the processor."""
    began, fault = time.process_time(), ""
    try:
        call()
    except RaytuneError as error:
        if error.exit_code != 2 or len(str(error)) > 2000:
            fault = f"exit code {error.exit_code}, {len(str(error))} letters"
    except BaseException as error:  # also what is no Exception: libraries in Rust panic
        fault = f"{type(error).__name__}: {error}"[:200]
    return fault, time.process_time() - began


def paths_in(value: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*above, key)
            if above[-1:] != ("vocab",):
                yield from paths_in(inner, (*above, key))


@pytest.mark.parametrize("third", variants([0], [1, 2]))
@pytest.mark.parametrize("file", ADDED)
def test_each_key_with_each_absurd_value_is_a_typed_error_or_works(folder: Path, file: str, third: int):
    """Each key with a third of the values often, and with all of them with `--slow`."""
    used = use_tokenizer if "tokenizer" in file else use_model
    text = (folder / file).read_text()
    paths = [path for path in paths_in(json.loads(text)) if len(path) < 3 or path[1] not in ("vocab", "merges")]
    faults = {}
    for (row, path), (column, (kind, value)) in product(
        enumerate([*paths, *((key,) for key in ADDED[file])]), enumerate(ABSURD.items())
    ):
        if (row + column) % 3 != third:
            continue
        if path == ("model_type",) and isinstance(value, str):
            continue  # another architecture: transformers builds it, elsewhere
        changed = json.loads(text)
        inside = changed
        for part in path[:-1]:
            inside = inside[part]
        inside[path[-1]] = value
        (folder / file).write_text(json.dumps(changed))
        faults[".".join(path), kind] = fault(lambda: used(folder))
    assert {case: found for case, found in faults.items() if found} == {}


@pytest.mark.parametrize("kind", RAW)
@pytest.mark.parametrize("file", [*ADDED, "model.safetensors"])
def test_a_file_of_anything_is_a_typed_error_or_works(folder: Path, file: str, kind: str):
    (folder / file).write_bytes(RAW[kind])
    assert fault(lambda: use(folder)) == ""


@pytest.mark.parametrize("file", [*ADDED, "model.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "device", "nowhere", "gigabytes"])
def test_what_is_no_file_or_has_gigabytes_is_a_typed_error(folder: Path, file: str, kind: str):
    path = folder / file
    path.unlink()
    make: dict[str, Callable[[], object]] = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "nowhere": lambda: path.symlink_to(folder / "nowhere"),
        "gigabytes": lambda: (path.touch(), os.truncate(path, 3 << 30)),
    }
    make[kind]()
    assert fault(lambda: use(folder)) == ""
    with pytest.raises(ModelError, match=str(folder)):
        use(folder)


HEADERS: dict[str, Any] = {
    "length beyond the file": struct.pack("<Q", 1 << 62) + b"{}",
    "length of the file": struct.pack("<Q", 2**64 - 1),
    "no JSON": struct.pack("<Q", 4) + b"{{{{",
    "brackets": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "a list": {"model.norm.weight": [1]},
    "negative shape": {"model.norm.weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "huge shape": {"model.norm.weight": {"dtype": "F32", "shape": [10**18, 10**18], "data_offsets": [0, 4]}},
    "offsets backwards": {"model.norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    "no such dtype": {"model.norm.weight": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}},
    "text for numbers": {"model.norm.weight": {"dtype": "F32", "shape": "x", "data_offsets": "y"}},
    "nothing": {},
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_of_anything_is_a_typed_error(folder: Path, kind: str):
    header = HEADERS[kind]
    if isinstance(header, dict):
        text = json.dumps(header).encode()
        header = struct.pack("<Q", len(text)) + text + b"\0" * 4
    (folder / "model.safetensors").write_bytes(header)
    with pytest.raises(ModelError):
        use(folder)
    assert fault(lambda: use(folder)) == ""


INDEXES: dict[str, Any] = {
    "a list": [],
    "no map": {"metadata": {}},
    "a map of numbers": {"weight_map": {"a": 1}},
    "no files": {"weight_map": {}},
    "out of the folder": {"weight_map": {"a": "../../etc/passwd"}},
    "absolute": {"weight_map": {"a": "/etc/passwd"}},
    "not there": {"weight_map": {"a": "b.safetensors"}},
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_of_anything_is_a_typed_error(folder: Path, kind: str):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(INDEXES[kind]))
    with pytest.raises(ModelError):
        use(folder)
    (folder / "model.safetensors.index.json").write_bytes(b"[" * 1_000_000)
    assert fault(lambda: use(folder)) == ""


@pytest.mark.parametrize("changes", [{"num_attention_heads": 5}, {"num_key_value_heads": 3}, {"hidden_size": 66}])
def test_numbers_that_do_not_divide_are_named(changes: dict[str, int]):
    numbers = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    with pytest.raises(ModelError, match=f"{next(iter(changes))}.* does not divide"):
        model_shape({"model_type": "llama", "num_key_value_heads": 4, **numbers, **changes}, "config.json")


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_local_experts"])
def test_sizes_that_no_model_has_are_named_at_any_depth(key: str):
    with pytest.raises(ModelError, match=f"config.json: {key} is 1000000000000, and no model has more than"):
        check_numbers({"text_config": {key: 10**12}}, "config.json")


def test_an_architecture_without_a_reader_is_refused_before_it_is_built(tmp_path: Path):
    for key in ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "num_experts", "num_local_experts"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi", "nested": {key: 10**9}}))
        began = time.process_time()
        with pytest.raises(ModelError, match=f"{key} is 1000000000"):
            read_model_shape(str(tmp_path))
        assert time.process_time() - began < SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("limits", ["seconds=0.2", "num_bytes=1 << 20"])
def test_building_a_strangers_model_has_limits_of_time_and_memory(tmp_path: Path, limits: str):
    numbers = {"num_hidden_layers": 1000, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi", "vocab_size": 99} | numbers))
    code = f"from raytune.model.meta_shape import main; main([{str(tmp_path)!r}], {limits})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200)
    assert "error" in json.loads(done.stdout), done.stderr
