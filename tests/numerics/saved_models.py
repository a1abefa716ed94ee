"""What a saved model is worth to somebody who has transformers and PEFT only."""

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from raytune.data.store import Store
from raytune.plan.run_plan import RunPlan


def loss_by_plain_transformers(plan: RunPlan, model_path: str) -> float:
    """Mean loss per validation target in fp32, a document at a time, by nothing of ours but the tokens."""
    loader = AutoModelForCausalLM if plan.adapter.method == "full" else AutoPeftModelForCausalLM
    model = loader.from_pretrained(model_path, dtype=torch.float32).eval()
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
