"""The loop = transformers.Trainer, which is only an oracle here: over warm-up, accumulation, clipping, decay and uneven masks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from raytune.data.batches.batches import Batch
from raytune.model.attention.attention import model_inputs
from raytune.model.load import load_model
from raytune.plan.run_plan import RunPlan
from raytune.training.engines.optimizer import build_optimizer
from raytune.training.engines.plain_engine import PlainEngine
from raytune.training.losses.losses import attach_loss
from raytune.training.steps.loop import LossSum, training_steps
from raytune.training.steps.schedule import learning_rate
from tests.numerics.runs import SAME_SUMS, Material, make_plan

NUM_STEPS, ACCUMULATION, NUM_WARMUP_STEPS = 12, 3, 3
CPU = torch.device("cpu")
IGNORED = -100


@dataclass(frozen=True)
class Document:
    ids: list[int]
    labels: list[int]


class InOrder(Trainer):
    """A Trainer that takes rows as they come."""

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # pyright: ignore[reportArgumentType]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer takes a LOCAL_RANK, which other tests leave behind, for a distributed run."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def make_documents(num_documents: int) -> list[Document]:
    """Documents of 8 to 40 tokens, of which a few or almost all are targets."""
    generator = torch.Generator().manual_seed(0)
    documents = []
    for _ in range(num_documents):
        length = int(torch.randint(8, 41, (), generator=generator))
        first_target = int(torch.randint(1, length - 1, (), generator=generator))
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        documents.append(Document(ids, [IGNORED] * first_target + ids[first_target:]))
    return documents


def plan_of(material: Material) -> RunPlan:
    return make_plan(
        material,
        optimization={"num_steps": NUM_STEPS, "warmup_steps": NUM_WARMUP_STEPS, "max_grad_norm": 0.3, "learning_rate": 5e-3},
    )


def trained_by_trainer(
    plan: RunPlan, documents: list[Document], batch_size: int, folder: Path
) -> tuple[dict[str, Tensor], list[float]]:
    settings = plan.optimization
    model = LlamaForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32)
    trainer = InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=NUM_STEPS,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=ACCUMULATION,
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            lr_scheduler_type="linear",
            weight_decay=settings.weight_decay,
            adam_epsilon=settings.epsilon,
            max_grad_norm=settings.max_grad_norm,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=documents,  # pyright: ignore[reportArgumentType]
        data_collator=padded,
    )
    trainer.train()
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, norms


def padded(documents: list[Document]) -> dict[str, Tensor]:
    """Pad on the right, and only then with a mask."""
    longest = max(len(document.ids) for document in documents)
    rows = [(document, longest - len(document.ids)) for document in documents]
    batch = {
        "input_ids": torch.tensor([document.ids + [0] * padding for document, padding in rows]),
        "labels": torch.tensor([document.labels + [IGNORED] * padding for document, padding in rows]),
    }
    if any(padding for _, padding in rows):
        batch["attention_mask"] = torch.tensor([[1] * (longest - padding) + [0] * padding for _, padding in rows])
    return batch


def laid_end_to_end(documents: list[Document], num_targets_in_step: int) -> Batch:
    ids, positions, ends, targets = [], [], [0], []
    for document in documents:
        targets += [len(ids) + index for index, label in enumerate(document.labels) if label != IGNORED]
        ids += document.ids
        positions += range(len(document.ids))
        ends.append(len(ids))
    return Batch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        cumulative_lengths=torch.tensor(ends, dtype=torch.int32),
        max_document_length=max(len(document.ids) for document in documents),
        target_positions=torch.tensor(targets) - 1,
        target_ids=torch.tensor(ids)[targets],
        num_targets_in_step=num_targets_in_step,
        rows=(),
    )


def trained_by_raytune(
    plan: RunPlan, documents: list[Document], batch_size: int, make_loss: Any
) -> tuple[dict[str, Tensor], list[float]]:
    model = load_model(plan.model, plan.adapter, device=CPU, seed=0)
    engine = PlainEngine(
        model,
        build_optimizer(model, plan.optimization, device=CPU),
        precision="fp32",
        max_grad_norm=plan.optimization.max_grad_norm,
        device=CPU,
    )

    def batches_of(step: int) -> list[Batch]:
        rows_of_step = documents[step * batch_size * ACCUMULATION :][: batch_size * ACCUMULATION]
        num_targets = sum(label != IGNORED for document in rows_of_step for label in document.labels)
        return [
            laid_end_to_end(rows_of_step[first:][:batch_size], num_targets) for first in range(0, len(rows_of_step), batch_size)
        ]

    loss_sum: LossSum = make_loss(model)
    steps = training_steps(
        engine, batches_of, loss_sum, lambda step: learning_rate(step, plan.optimization), start=0, stop=NUM_STEPS, seed=0
    )
    norms = [result.read(engine).grad_norm for result in steps]
    return dict(engine.model.named_parameters()), norms


def all_positions(_: nn.Module) -> LossSum:
    """The operations of transformers' own loss: every position is projected."""

    def loss_sum(module: nn.Module, batch: Batch) -> Tensor:
        logits = module(input_ids=batch.input_ids, use_cache=False).logits
        labels = torch.full_like(batch.input_ids, IGNORED)
        labels[0, batch.target_positions] = batch.target_ids
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), ignore_index=IGNORED, reduction="sum")

    return loss_sum


def target_positions(model: nn.Module) -> LossSum:
    """What a run uses."""
    layer = attach_loss(model, None)
    return lambda module, batch: layer.loss_sum(module, batch, model_inputs(batch, "varlen"))


def test_weights_after_twelve_steps_equal_those_of_trainer_bit_for_bit(material: Material, tmp_path: Path) -> None:
    plan, documents = plan_of(material), make_documents(NUM_STEPS * ACCUMULATION)
    plan = plan.model_copy(update={"model": plan.model.model_copy(update={"attention": "sdpa"})})
    expected, norms = trained_by_trainer(plan, documents, 1, tmp_path)
    trained, own_norms = trained_by_raytune(plan, documents, 1, all_positions)
    assert own_norms == norms
    assert max(norms) > plan.optimization.max_grad_norm  # the clip did something
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], expected[name]) for name in expected)


def test_packed_rows_equal_padded_batches_of_trainer(material: Material, tmp_path: Path) -> None:
    plan, documents = plan_of(material), make_documents(4 * NUM_STEPS * ACCUMULATION)
    expected, norms = trained_by_trainer(plan, documents, 4, tmp_path)
    trained, own_norms = trained_by_raytune(plan, documents, 4, target_positions)
    torch.testing.assert_close(own_norms, norms, rtol=SAME_SUMS, atol=0)
    for name in expected:
        torch.testing.assert_close(trained[name], expected[name], rtol=0, atol=SAME_SUMS)
