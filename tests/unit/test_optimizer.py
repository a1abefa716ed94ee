"""Optimizers and their parameter groups against transformers, PEFT, PyTorch, bitsandbytes and the papers' formulas."""

from typing import Any, get_args

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer
from transformers.optimization import Adafactor

from raytune.config.sections.training import Optimizer
from raytune.plan.run_plan import OptimizationPlan
from raytune.training.engines.optimizer import build_optimizer, parameter_groups
from tests.tiny import tiny_model, tiny_plan

CPU = torch.device("cpu")


def plan(**changes: Any) -> OptimizationPlan:
    return tiny_plan(optimization={"weight_decay": 0.1, "beta2": 0.95} | changes).optimization


def lora_model(**lora: Any) -> nn.Module:
    return get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **lora))


def by_name(groups: list[dict[str, Any]], key: str) -> dict[str, float]:
    return {name: group[key] for group in groups for name in group["names"]}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "lora"])
def test_weight_decay_follows_transformers_trainer(kind: str) -> None:
    torch.manual_seed(0)
    gpt2 = GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
    model = {"llama": tiny_model, "gpt2": lambda: GPT2LMHeadModel(gpt2), "lora": lora_model}[kind]()
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # pyright: ignore[reportArgumentType]
    expected = {name: 0.1 if name in decayed else 0.0 for name, weight in model.named_parameters() if weight.requires_grad}
    assert by_name(parameter_groups(model, plan()), "weight_decay") == expected


def test_a_parameter_of_one_dimension_is_not_decayed_whatever_its_name() -> None:
    decay = by_name(parameter_groups(lora_model(use_dora=True), plan()), "weight_decay")
    magnitudes = [name for name in decay if "magnitude" in name]
    assert len(magnitudes) == 4
    assert all(decay[name] == 0.0 for name in magnitudes)


def test_a_shard_of_zero_3_is_grouped_by_the_shape_of_the_whole() -> None:
    model = tiny_model()
    whole = parameter_groups(model, plan())
    for weight in model.parameters():
        weight.ds_shape = weight.shape  # pyright: ignore[reportAttributeAccessIssue]
        weight.data = weight.data.flatten()[:0]
    sharded = parameter_groups(model, plan())
    assert [group["names"] for group in sharded] == [group["names"] for group in whole]


def test_groups_name_their_parameters_and_leave_out_frozen_ones() -> None:
    model = lora_model()
    parameters = dict(model.named_parameters())
    groups = build_optimizer(model, plan(), CPU).param_groups
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, weight in parameters.items() if weight.requires_grad)
    assert all(parameters[name] is weight for group in groups for name, weight in zip(group["names"], group["params"]))


@pytest.mark.parametrize(
    "lora",
    [{}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]}],
    ids=["plain", "biases", "saved head", "embedding"],
)
@pytest.mark.parametrize("embedding_rate", [1e-6, 3e-4])
def test_lora_plus_groups_are_those_of_peft(embedding_rate: float, lora: dict[str, Any]) -> None:
    settings = {"target_modules": ["q_proj"]} | lora
    model = get_peft_model(tiny_model(tied=False, attention_bias=True), LoraConfig(r=4, **settings))
    oracle = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=16.0,
        loraplus_lr_embedding=embedding_rate,
        loraplus_weight_decay=0.1,  # pyright: ignore[reportArgumentType]
    )
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = build_optimizer(model, plan(lora_plus_ratio=16.0, lora_plus_embedding_rate=embedding_rate), CPU).param_groups
    for key in ("lr", "weight_decay"):
        expected = {names[id(weight)]: group[key] for group in oracle.param_groups for weight in group["params"]}
        assert by_name(groups, key) == pytest.approx(expected)
    assert all(group["lr"] == pytest.approx(1e-3 * group["lr_scale"]) for group in groups)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights after three updates with random gradients."""
    random = torch.Generator().manual_seed(0)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=random)
        optimizer.step()
    return [weight.detach() for weight in weights]


def torch_adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)


class LionOfThePaper(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                update = (0.9 * momentum + 0.1 * weight.grad).sign()
                weight -= group["lr"] * (update + group["weight_decay"] * weight)
                momentum.mul_(0.95).add_(weight.grad, alpha=0.05)


ORACLES = {
    "adamw": torch_adamw,
    "paged_adamw": torch_adamw,
    "adafactor": lambda groups: Adafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False),
    "lion": LionOfThePaper,
}


@pytest.mark.parametrize("name", ORACLES)
def test_updates_are_those_of_the_reference(name: Optimizer) -> None:
    ours, theirs = tiny_model(), tiny_model()
    settings = plan(optimizer=name)
    expected = trained(theirs, ORACLES[name](parameter_groups(theirs, settings)))
    # Updates are of the order of 1e-3, in fp32, with sums in another order.
    torch.testing.assert_close(trained(ours, build_optimizer(ours, settings, CPU)), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bit_updates_are_those_of_bitsandbytes(name: Optimizer) -> None:
    shape = {"tied": False, "hidden_size": 64, "intermediate_size": 128}
    ours, theirs = tiny_model(**shape), tiny_model(**shape)
    settings = plan(optimizer=name)
    groups = parameter_groups(theirs, settings)
    embedding = theirs.get_input_embeddings().weight
    expected = []
    for group in groups:  # embeddings apart, for bitsandbytes' own way of giving them 32 bits is global to the process
        has_embedding = any(weight is embedding for weight in group["params"])
        kind = bitsandbytes.optim.AdamW if has_embedding else bitsandbytes.optim.AdamW8bit
        expected.append(kind([group], betas=(0.9, 0.95), eps=1e-8))

    class Both(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__(groups, {})

        def step(self, closure: Any = None) -> None:
            for optimizer in expected:
                optimizer.step()

    torch.testing.assert_close(trained(ours, build_optimizer(ours, settings, CPU)), trained(theirs, Both()), rtol=0, atol=0)


def test_muon_updates_matrices_of_hidden_layers_and_adamw_all_else() -> None:
    ours, theirs = tiny_model(tied=False, attention_bias=True), tiny_model(tied=False, attention_bias=True)
    settings = plan(optimizer="muon")
    named = [(name, weight, 0.1 * (weight.dim() > 1)) for name, weight in theirs.named_parameters()]
    groups = [{"params": [weight], "lr": 1e-3, "weight_decay": decay, "name": name} for name, weight, decay in named]
    hidden = [one for one in groups if "_proj.weight" in one["name"]]
    others = [one for one in groups if "_proj.weight" not in one["name"]]
    assert len(hidden) == 7 * len(theirs.model.layers)

    class Both(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__(groups, {})
            adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), eps=1e-8, fused=True)
            self.both = torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw"), adamw

        def step(self, closure: Any = None) -> None:
            for optimizer in self.both:
                optimizer.step()

    torch.testing.assert_close(trained(ours, build_optimizer(ours, settings, CPU)), trained(theirs, Both()), rtol=0, atol=0)


@pytest.mark.parametrize("lora", [{}, {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "use_dora": True}])
def test_muon_orthogonalises_both_factors_of_updates_of_hidden_layers(lora: dict[str, Any]) -> None:
    model = get_peft_model(tiny_model(tied=False), LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | lora))
    groups = build_optimizer(model, plan(optimizer="muon"), CPU).param_groups
    hidden = {name for group in groups if group["is_orthogonalised"] for name in group["names"]}
    expected = {name for name, weight in model.named_parameters() if weight.requires_grad and "q_proj.lora_" in name}
    assert hidden == {name for name in expected if "magnitude" not in name}


def state_bytes(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> int:
    return sum(value.nbytes for value in optimizer.state[weight].values() if isinstance(value, Tensor))


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_state_takes_the_bytes_that_the_optimizer_is_known_for(name: Optimizer) -> None:
    model = tiny_model(tied=False, hidden_size=64, intermediate_size=128)
    optimizer = build_optimizer(model, plan(optimizer=name), CPU)
    trained(model, optimizer)
    matrix = model.model.layers[0].mlp.gate_proj.weight
    size, (rows, columns) = matrix.numel(), matrix.shape
    eight_bit = 2 * size + 2 * 4 * size // 256 + 2 * 4 * 256  # two moments, their scale per 256 values, two maps to floats
    expected = {
        "adamw": 2 * 4 * size + 4,  # and the step
        "paged_adamw": 2 * 4 * size,
        "adamw_8bit": eight_bit,
        "paged_adamw_8bit": eight_bit,
        "adafactor": 4 * (rows + columns) + 4,  # and the root mean square of the weights
        "lion": 4 * size,
        "muon": 4 * size,
        "schedule_free_adamw": 2 * 4 * size,
    }
    assert state_bytes(optimizer, matrix) == expected[name]
    if "8bit" in name:
        embedding = model.get_input_embeddings().weight
        assert state_bytes(optimizer, embedding) == 2 * 4 * embedding.numel()
