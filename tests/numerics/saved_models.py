"""What a saved model is worth to somebody who has transformers and PEFT only."""

from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from raytune.data.store.store import Store
from raytune.plan.model.base_model import model_files
from raytune.plan.run_plan import RunPlan


def plainly_loaded(plan: RunPlan, model_path: str) -> Any:
    """In fp32. A base whose adapter was trained with more rows or other positions gets them first, as the plan's notes say."""
    if plan.adapter.method == "full":
        return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    config = AutoConfig.from_pretrained(model_files(plan.model.path))
    if rope := plan.model.rope:
        config.rope_parameters = {"rope_theta": config.rope_parameters["rope_theta"]} | rope.parameters
        config.max_position_embeddings = rope.max_position_embeddings
    base = AutoModelForCausalLM.from_pretrained(model_files(plan.model.path), config=config, dtype=torch.float32)
    if plan.model.num_embeddings is not None:
        base.resize_token_embeddings(plan.model.num_embeddings)
    return PeftModel.from_pretrained(base, model_path)


def loss_by_plain_transformers(plan: RunPlan, model_path: str) -> float:
    """Mean loss per validation target in fp32, a document at a time, by nothing of ours but the tokens."""
    model = plainly_loaded(plan, model_path).eval()
    store = Store.open(plan.data.validation[0].path)
    total, count = 0.0, 0
    for index in range(store.num_rows):
        row, start = store.row(index), 0
        for length in row.document_lengths.tolist():
            ids = torch.tensor(row.input_ids[start : start + length], dtype=torch.long)
            targets = torch.tensor(row.is_target[start : start + length])
            with torch.no_grad():
                log_probabilities = model(ids[None]).logits[0].log_softmax(-1)
            picked = log_probabilities[:-1].gather(1, ids[1:, None])[:, 0][targets[1:]]
            total, count, start = total - picked.sum().item(), count + int(targets[1:].sum()), start + length
    return total / count
