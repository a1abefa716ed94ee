"""What `export` leaves is what it was made of: transformers and gguf, in a process without raytune, compute the same."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

import raytune
from raytune.errors import ModelError, RaytuneError, StorageFullError, UserError
from raytune.launch.export.export import ExportOptions, export
from raytune.missing import missing_package
from raytune.model.files.whole_folder import require_room
from raytune.model.files.whole_model import whole_model
from raytune.model.gguf.gguf_file import GgufModel
from tests.tiny import save_tiny_model, tiny_tokenizer

IDS = torch.randint(3, 60, (2, 25), generator=torch.Generator().manual_seed(3))
SUMS_IN_ANOTHER_ORDER = 1e-5
RUN = Path(__file__).parents[1] / "compat" / "identity"


def saved(config: Any, folder: Path) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # which are 1 and 0 in a fresh model
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {
        **{"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "initializer_range": 0.1, "pad_token_id": 256, "eos_token_id": 258, "bos_token_id": None},
    }
    return {
        "llama": save_tiny_model(root / "llama", hidden_size=64, initializer_range=0.1),
        "llama of wide heads": save_tiny_model(root / "wide", tied=False, head_dim=24, initializer_range=0.1),
        "mistral": saved(
            MistralConfig(sliding_window=64, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, **sizes),
            root / "of mistral",
        ),
        "qwen2": saved(Qwen2Config(tie_word_embeddings=True, **sizes), root / "qwen2"),
        "qwen3": saved(Qwen3Config(head_dim=128, **sizes), root / "qwen3"),
    }


@pytest.fixture(scope="module")
def adapter(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(models["llama"]), LoraConfig(target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(folder := tmp_path_factory.mktemp("tuned") / "model"))
    return folder


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def whole(folder: Path, **how: Any) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how))


@pytest.mark.parametrize("family", ["llama", "llama of wide heads", "mistral", "qwen2", "qwen3"])
def test_a_gguf_computes_what_the_model_does(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    exported = export(str(models[family]), tmp_path / "out", ExportOptions(format="gguf"))
    (name,) = exported.files
    assert name.endswith("-F32.gguf")
    found = whole(tmp_path / "out", gguf_file=name)
    assert (found - whole(models[family])).abs().max() <= SUMS_IN_ANOTHER_ORDER
    assert any("context of 64 tokens" in note for note in exported.notes) == (family == "mistral")


@pytest.mark.parametrize(("kind", "near"), [("fp16", 0.02), ("bf16", 0.2), ("q8_0", 0.2)])
def test_a_packed_gguf_computes_nearly_that_and_a_damaged_one_is_noticed(
    kind: Any, near: float, models: dict[str, Path], tmp_path: Path
) -> None:
    model = whole_model(models["qwen2"])
    gguf = GgufModel(model.weights, model.config, tiny_tokenizer(), None, kind, "it")
    gguf.write(tmp_path / "it.gguf")
    gguf.check(tmp_path / "it.gguf")
    difference = (whole(tmp_path, gguf_file="it.gguf") - whole(models["qwen2"])).abs().max()
    assert 0 < difference < near, "logits of some units, of weights with 8 to 11 bits"
    with open(tmp_path / "it.gguf", "r+b") as file:
        file.seek(-40, os.SEEK_END)
        file.write(b"\x7b" * 8)
    with pytest.raises(ModelError, match="holds other numbers for"):
        gguf.check(tmp_path / "it.gguf")


def test_what_is_exported_needs_no_raytune(models: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    assert raytune.export(adapter, tmp_path / "whole", max_shard="100KB").path == str(tmp_path / "whole")
    assert len([*(tmp_path / "whole").glob("*.safetensors")]) > 2
    raytune.export(adapter, tmp_path / "gguf", format="gguf")
    raytune.export(models["llama"], tmp_path / "half", dtype="fp16")
    code = f"""
import json, sys, torch
sys.modules["raytune"] = None
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
load = AutoModelForCausalLM.from_pretrained
ids = torch.tensor({IDS.tolist()})
models = [PeftModel.from_pretrained(load({str(models["llama"])!r}), {str(adapter)!r}), load({str(tmp_path / "whole")!r})]
models.append(load({str(tmp_path / "gguf")!r}, gguf_file="{adapter.parent.name}-F32.gguf", dtype=torch.float32))
half = load({str(tmp_path / "half")!r})
with torch.inference_mode():
    tuned, *others = [model.eval()(input_ids=ids).logits for model in models]
    known = load({str(models["llama"])!r}, dtype=torch.float16)(input_ids=ids).logits
    differences = [(one - tuned).abs().max().item() for one in others] + [(half(input_ids=ids).logits - known).abs().max().item()]
whole = AutoTokenizer.from_pretrained({str(tmp_path / "whole")!r})
read = AutoTokenizer.from_pretrained({str(tmp_path / "gguf")!r}, gguf_file="{adapter.parent.name}-F32.gguf")
text = "<|im_start|>user\\nGrüße, 12 €<|im_end|>"
is_same = [whole(text).input_ids == read(text).input_ids, read.chat_template == whole.chat_template]
print(json.dumps([differences, str(half.dtype), *is_same]))
"""
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    differences, dtype, *is_same = json.loads(told.stdout.splitlines()[-1])
    assert max(differences) <= SUMS_IN_ANOTHER_ORDER
    assert (dtype, is_same) == ("torch.float16", [True, True])


def test_llama_3_positions_are_factors_of_frequencies(tmp_path: Path) -> None:
    from gguf import GGUFReader

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    folder = save_tiny_model(tmp_path / "it", head_dim=64, rope_parameters=rope | {"original_max_position_embeddings": 256})
    export(str(folder), tmp_path / "out", ExportOptions(format="gguf"))
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "out" / "it-F32.gguf").tensors}
    own = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    plain = 1.0 / 5e5 ** (torch.arange(0, 64, 2).float() / 64)
    factors = torch.tensor(tensors["rope_freqs.weight"])
    torch.testing.assert_close(plain / factors, own, rtol=1e-6, atol=0)
    assert factors.min() == 1
    assert factors.max() == 8


def test_what_a_gguf_cannot_say_is_refused_with_the_way_out(models: dict[str, Path], tmp_path: Path) -> None:
    def refused(folder: Path, match: str, **changes: Any) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        shutil.copytree(folder, tmp_path / "odd")
        (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=f"{match}.*--converter"):
            export(str(tmp_path / "odd"), tmp_path / "out", ExportOptions(format="gguf"))
        shutil.rmtree(tmp_path / "odd")
        assert [*tmp_path.iterdir()] == []

    refused(models["llama"], "hidden_act: gelu", hidden_act="gelu")
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    refused(models["llama"], "scaled by .*dynamic", rope_parameters=dynamic)
    folder = saved(GPTNeoXConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=4), tmp_path / "x")
    with pytest.raises(ModelError, match=r"type gpt_neox .* llama, mistral, qwen2, qwen3\. With llama.cpp .*--converter"):
        export(str(folder), tmp_path / "out", ExportOptions(format="gguf"))
    over_it = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["query_key_value"]))
    over_it.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match="type gpt_neox"):  # before it is merged
        export(str(tmp_path / "adapter"), tmp_path / "out", ExportOptions(format="gguf"))


def test_a_users_converter_is_run_on_the_whole_model(adapter: Path, models: dict[str, Path], tmp_path: Path) -> None:
    own = tmp_path / "convert.py"
    export(str(models["llama"]), tmp_path / "ours", ExportOptions(format="gguf"))
    (file,) = (tmp_path / "ours").iterdir()
    own.write_text(
        "import pathlib, shutil, sys\n"
        "model, _, target, _, kind = sys.argv[1:]\n"
        "assert kind == 'q8_0' and (pathlib.Path(model) / 'model.safetensors').is_file()\n"
        f"shutil.copyfile({str(file)!r}, target)\n"
    )
    exported = export(str(adapter), tmp_path / "out", ExportOptions(format="gguf", dtype="q8_0", converter=str(own)))
    assert [*exported.files] == [f"{adapter.parent.name}-Q8_0.gguf"]
    own.write_text("print('first')\nraise SystemExit('This architecture is not known.')")
    with pytest.raises(ModelError, match=r"exit code 1\. Its last lines:\n(.|\n)*This architecture is not known"):
        export(str(adapter), tmp_path / "none", ExportOptions(format="gguf", converter=str(own)))
    own.write_text("import sys; open(sys.argv[3], 'w').write('GGUF, but not really' * 9)")
    with pytest.raises(ModelError, match="gguf's reader cannot read"):
        export(str(adapter), tmp_path / "none", ExportOptions(format="gguf", converter=str(own)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["convert.py", "ours", "out"]


def test_a_run_is_made_ready_for_a_quantiser_with_its_own_rows(tmp_path: Path) -> None:
    run = tmp_path / "finished"
    shutil.copytree(RUN / "storage" / "finished", run)
    for name in ("run.json", "plan.json"):
        (run / name).write_text(
            (run / name).read_text().replace("/srv/first/runs", str(tmp_path)).replace("/srv/first", str(RUN))
        )
    exported = export(str(run), tmp_path / "out", ExportOptions(format="awq-ready", num_rows=3))
    texts = [json.loads(line)["text"] for line in (tmp_path / "out" / "calibration.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (RUN / "rows" / "train.jsonl").read_text().splitlines()][:3]
    assert len(texts) == 3
    assert all(row["messages"][-1]["content"] in text and "<|im_start|>" in text for row, text in zip(rows, texts, strict=True))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert "GPTQModel" in (tmp_path / "out" / "README.md").read_text()
    assert "calibration.jsonl" in exported.lines[-1]
    (run / "run.json").write_text((run / "run.json").read_text().replace('"state": "finished"', '"state": "stopped"'))
    with pytest.raises(UserError, match="has not finished"):
        export(str(run), tmp_path / "other", ExportOptions())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "q8_0"}, "q8_0 is a type of GGUF only"),
        ({"format": "awq-ready"}, "needs rows to calibrate with"),
        ({"format": "awq-ready", "dtype": "fp32"}, "16 bits"),
        ({"converter": "x.py"}, "for --format gguf only"),
        ({"format": "gguf", "converter": "x.py"}, "there is no such file"),
        ({"calibration": "rows.jsonl"}, "for --format awq-ready only"),
        ({"num_rows": 4}, "--rows is for --format awq-ready only"),
        ({"base": "demo"}, "is a whole model, which lies over none"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: dict[str, Any], words: str, models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        export(str(models["llama"]), tmp_path / "out", ExportOptions(**options))
    assert [*tmp_path.iterdir()] == []


def test_numbers_that_fp16_does_not_hold_and_a_full_disk_leave_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models["llama"], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for options in (ExportOptions(dtype="fp16"), ExportOptions(format="gguf", dtype="fp16")):
        with pytest.raises(ModelError, match=r"holds 1e\+05, and float16 no number above 65504\. Take --dtype bf16"):
            export(str(folder), tmp_path / "out", options)
    with pytest.raises(StorageFullError, match=r"The model takes 888 PiB|The model takes .* bytes\), and the disk of"):
        require_room(tmp_path / "out", 10**18, "The model")
    assert [*tmp_path.iterdir()] == [folder]


def test_a_missing_package_is_named_with_what_installs_it(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "raytune.model.gguf.gguf_file")
    with pytest.raises(ModuleNotFoundError) as missing:
        export(str(adapter), tmp_path / "out", ExportOptions(format="gguf"))
    assert "[gguf]" in missing_package(missing.value)
    assert [*tmp_path.iterdir()] == []


def test_a_quantised_model_and_an_occupied_folder_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models["llama"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"stored quantised .*Export the original.*dequantize"):
        export(str(folder), tmp_path / "out", ExportOptions())
    with pytest.raises(RaytuneError, match="already holds files"):
        export(str(models["llama"]), folder, ExportOptions())
