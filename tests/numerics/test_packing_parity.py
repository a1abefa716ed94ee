"""Packed = alone, and our LoRA = peft's: losses and gradients against plain code that sees one document at a time."""

import torch
from torch import Tensor, nn

from raytune.data.batches.batches import Batch
from tests.numerics.oracles import document_loss, documents, plain_lora_losses
from tests.numerics.runs import LORA, SAME_SUMS, Material, make_plan, relative_difference, start, train


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_packed_documents_have_the_loss_and_gradients_of_each_alone(material: Material) -> None:
    engine, loss_sum, batches_of = start(make_plan(material))
    batches: list[Batch] = list(batches_of(0))
    assert all(len(documents(batch)) > len(batch.rows) for batch in batches)  # rows are packed
    num_targets = batches[0].num_targets_in_step

    packed_loss = sum(loss_sum(engine.module, batch) for batch in batches) / num_targets
    engine.backward(packed_loss)
    packed = {name: gradient.clone() for name, gradient in gradients(engine.model).items()}
    engine.model.zero_grad()
    alone_loss = sum(document_loss(engine.model, *document) for batch in batches for document in documents(batch)) / num_targets
    engine.backward(alone_loss)

    assert relative_difference([packed_loss.item()], [alone_loss.item()]) <= SAME_SUMS
    alone = gradients(engine.model)
    assert packed.keys() == alone.keys()
    norm = torch.stack([gradient.norm() for gradient in alone.values()]).norm().item()
    assert all((packed[name] - alone[name]).norm().item() <= SAME_SUMS * norm for name in alone)


def test_lora_equals_peft_in_a_plain_loop(material: Material) -> None:
    plan = make_plan(material, adapter=LORA)
    assert relative_difference(train(plan).losses, plain_lora_losses(plan)) <= SAME_SUMS
