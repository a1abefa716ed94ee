"""Methods that lay virtual tokens in front of documents, besides what test_peft_methods.py holds of every method: packed rows under
each kind of attention and in each family, starts, files of plain PEFT, answers, and the base that they leave alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune.config.adapter import Adapter
from raytune.data.in_front import laid_out
from raytune.errors import ModelError
from raytune.evaluate.generation import write_answers
from raytune.model.adapters import adapting
from raytune.model.export import save_adapter
from raytune.model.inference import load_saved
from raytune.model.load import load_model
from raytune.model.merge import merge_adapter
from tests.numerics.oracles import documents
from tests.numerics.runs import SAME_SUMS, Material, batches_of_rank, relative_difference, train
from tests.numerics.test_peft_methods import CPU, IDS, logits, plain_losses, plan_of, run_alone
from tests.peft_methods import EVERY, IN_FRONT

TEXT = "Answer in one short sentence."


@pytest.mark.parametrize("method", IN_FRONT)
def test_what_is_saved_computes_the_same_in_plain_peft(method: str, material: Material, tmp_path: Path) -> None:
    engine, seen = run_alone(method, material)
    save_adapter(engine.model, seen.weights, tmp_path / "adapter")
    ours = logits(engine.model.eval())
    base = AutoModelForCausalLM.from_pretrained(material.model, dtype=torch.float32)
    assert (ours[:, -IDS.shape[1] :] - logits(base)).abs().max() > 1e-2
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert (ours - logits(plain)).abs().max() <= SAME_SUMS
    loaded: Any = load_saved(plan_of(method, material), tmp_path / "adapter", device=CPU)
    assert [name for name, one in loaded.named_parameters() if one.requires_grad] == ["prompt_encoder.default.embedding.weight"]
    assert (ours - logits(loaded.eval())).abs().max() <= SAME_SUMS
    with pytest.raises(ModelError, match=r"adapter of the kind \w+, and only those of .*lora.* are merged"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("method", IN_FRONT)
def test_the_start_is_plain_peft_s(method: str, material: Material) -> None:
    plan = plan_of(method, material)
    ours: Any = load_model(plan.model, plan.adapter, device=CPU, seed=plan.seed)
    base: Any = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32)
    torch.manual_seed(plan.seed)
    plain: Any = get_peft_model(base, EVERY[method].config())
    theirs = {name: one for name, one in plain.named_parameters() if one.requires_grad}
    trained = {name: one for name, one in ours.named_parameters() if one.requires_grad}
    assert trained.keys() == theirs.keys()
    assert all(trained[name].equal(theirs[name]) for name in theirs)
    assert (logits(ours.eval()) - logits(plain.eval())).abs().max() == 0
