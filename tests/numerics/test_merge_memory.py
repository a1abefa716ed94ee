"""A merge and an export of a model larger than the memory that they take."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from raytune.model.files.rewriting import merging_of
from tests.tiny import save_tiny_model, tiny_tokenizer

SHARD_BYTES = 40 * 2**20
SIZES: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8, "num_key_value_heads": 4}
LAYERS = 14
WORK = """
import json, sys, threading, torch
import raytune.model.gguf.gguf_file
from raytune.launch.export.export import ExportOptions, export
from pathlib import Path

def resident(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def peak_of(*asked):
    before, seen, done = resident("RssAnon"), [0], threading.Event()

    def look():
        while not done.wait(0.002):
            seen.append(resident("RssAnon"))

    looking = threading.Thread(target=look)
    looking.start()
    export(*asked)
    done.set()
    looking.join()
    return max(seen) - before, max(seen)

adapter, output, small, shard_bytes = sys.argv[1:]
output = Path(output)
torch.set_num_threads(1)
export(small, output / "warm", ExportOptions(format="gguf"))  # what libraries load with the first model is not of the weights
merged = peak_of(adapter, output / "whole", ExportOptions(max_shard_bytes=int(shard_bytes)))
packed = peak_of(str(output / "whole"), output / "gguf", ExportOptions(format="gguf", dtype="q8_0"))
print(json.dumps([merged, packed]))
"""


@pytest.mark.slow
def test_a_model_larger_than_its_memory_is_merged_and_exported(tmp_path: Path) -> None:
    """Peaks of memory that is the process's own; pages of files that it looks into are the kernel's to take back."""
    config = LlamaConfig(vocab_size=32000, num_hidden_layers=LAYERS, tie_word_embeddings=False, dtype="bfloat16", **SIZES)
    base = tmp_path / "base"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    tensors = {name: torch.randn(one.shape, dtype=torch.bfloat16) * 0.02 for name, one in model.state_dict().items()}
    base.mkdir()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    with torch.device("meta"):
        peft_model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    peft_model.peft_config["default"].base_model_name_or_path = str(base)
    adapter = tmp_path / "adapter"
    peft_model.peft_config["default"].save_pretrained(str(adapter))
    factors = {
        name.replace(".default", ""): torch.randn(one.shape) * 0.01
        for name, one in peft_model.named_parameters()
        if "lora_" in name
    }
    save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})

    need = merging_of([adapter], None, None, SHARD_BYTES)
    assert num_bytes > 300e6
    assert need.weights_bytes < 0.6 * num_bytes
    told = subprocess.run(
        [sys.executable, "-c", WORK, str(adapter), str(tmp_path), str(save_tiny_model(tmp_path / "small")), str(SHARD_BYTES)],
        capture_output=True,
        text=True,
        check=True,
    )
    (merging, merging_in_all), (packing, packing_in_all) = json.loads(told.stdout.splitlines()[-1])
    sys.stderr.write(f"model {num_bytes:.3g}, planned {need.weights_bytes:.3g}, merging {merging:.3g}, packing {packing:.3g}\n")
    assert merging < need.weights_bytes
    assert packing < 0.6 * num_bytes, "the fields of the file's tokens, as gguf's reader holds them, come on top"
    assert max(merging_in_all, packing_in_all) < need.memory_bytes
    assert len([*(tmp_path / "whole").glob("*.safetensors")]) > 8
