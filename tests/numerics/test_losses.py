"""The loss layer against the definition: all logits, softmax, the sum of cross-entropy over the targets."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from raytune.data.batches.batches import Batch
from raytune.errors import ModelError
from raytune.plan.costs.memory import bytes_per_target
from raytune.plan.model.references import planned_shape
from raytune.training.losses.losses import attach_loss
from raytune.training.losses.projections import add_product
from tests.bench.loss import PeakMemory
from tests.numerics.processes import run_on_ranks
from tests.unit.test_plan_memory import workload
from tests.variants import variants

VOCABULARY = 97
NUM_TOKENS = 40
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
SHAPE: dict[str, Any] = SPECIAL_TOKENS | {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2_SHAPE: dict[str, Any] = SPECIAL_TOKENS | {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}

torch.set_num_threads(1)


def plain() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))


def tied() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))


def soft_capped() -> nn.Module:
    # Eager: it caps attention scores too, which sdpa cannot.
    config = Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager")
    return Gemma2ForCausalLM(config)


def adapted(model: nn.Module, **lora: Any) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **lora))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "untied": plain,
    "tied": tied,
    "biased": lambda: PhiForCausalLM(PhiConfig(**SHAPE | {"num_key_value_heads": 4})),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SHAPE, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)),
    "soft cap": soft_capped,
    "logits divided": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "logits multiplied": lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.3)),
    "frozen head": lambda: adapted(plain(), target_modules=["q_proj"]),
    "adapted head": lambda: adapted(plain(), target_modules=["q_proj", "lm_head"]),
    "adapted tied head": lambda: adapted(tied(), target_modules=["q_proj", "lm_head"]),
    "DoRA on the head": lambda: adapted(plain(), target_modules=["lm_head"], use_dora=True),
    "saved head": lambda: adapted(plain(), target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "adapted head and soft cap": lambda: adapted(soft_capped(), target_modules=["lm_head"]),
}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]().train()


def make_batch(num_targets: int, seed: int = 0) -> Batch:
    random = torch.Generator().manual_seed(seed)
    return Batch(
        input_ids=torch.randint(VOCABULARY, (1, NUM_TOKENS), generator=random),
        position_ids=torch.arange(NUM_TOKENS)[None],
        cumulative_lengths=torch.tensor([0, NUM_TOKENS], dtype=torch.int32),
        max_document_length=NUM_TOKENS,
        target_positions=torch.randperm(NUM_TOKENS, generator=random)[:num_targets].sort().values,
        target_ids=torch.randint(VOCABULARY, (num_targets,), generator=random),
        num_targets_in_step=num_targets,
        rows=(0,),
    )


def inputs_of(batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch.input_ids, "use_cache": False}


def defined_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Through all logits of all positions."""
    logits = model(**inputs_of(batch)).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Of no rows, cross_entropy gives 0 with zero gradients, like a sum.
    return F.cross_entropy(logits[batch.target_positions], batch.target_ids, reduction="sum")


def our_loss(model: nn.Module, batch: Batch, chunk_tokens: int | None) -> Tensor:
    return attach_loss(model, chunk_tokens).loss_sum(model, batch, inputs_of(batch))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of a seventh of the loss, so that the factor that a loop puts before it is seen to arrive."""
    model.zero_grad()
    (loss / 7).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("chunk_tokens", [None, 7, 64])
@pytest.mark.parametrize("kind", MODELS)
def test_value_and_gradients_are_those_of_full_cross_entropy(kind: str, chunk_tokens: int | None) -> None:
    model, batch = build(kind), make_batch(23)
    expected = defined_loss(model, batch)
    theirs = gradients(model, expected)
    loss = our_loss(model, batch, chunk_tokens)
    # Sums of 23 terms of about 4.6 in another order: 23 roundings of at most 105 * 2^-24 each.
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    # Gradients are of the order of 1; products of length 97 and 40 in another order, some ten roundings of 2^-24.
    assert_same_gradients(gradients(model, loss), theirs, atol=1e-6)
    assert loss.dtype == torch.float32


@given(num_targets=st.integers(0, NUM_TOKENS), chunk_tokens=st.integers(1, NUM_TOKENS + 2), seed=st.integers(0, 5))
def test_any_number_of_targets_in_any_chunks_gives_the_same(num_targets: int, chunk_tokens: int, seed: int) -> None:
    model, batch = build("untied").double(), make_batch(num_targets, seed)
    expected = defined_loss(model, batch)
    theirs = gradients(model, expected)
    loss = our_loss(model, batch, chunk_tokens)
    # In doubles (eps 2e-16) any mistake of ours stands out from rounding.
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(gradients(model, loss), theirs, atol=1e-13)


@pytest.mark.parametrize("chunk_tokens", [None, 8])
@pytest.mark.parametrize("kind", ["untied", "tied", "adapted head", "saved head", "soft cap"])
def test_without_targets_the_loss_is_zero_and_so_is_every_gradient(kind: str, chunk_tokens: int | None) -> None:
    model = build(kind)
    loss = our_loss(model, make_batch(0), chunk_tokens)
    loss.backward()
    assert loss.item() == 0.0
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert all(weight.grad is not None and not weight.grad.any() for weight in trained)


@pytest.mark.parametrize("kind", ["untied", "tied", "saved head", "soft cap"])
def test_no_size_of_chunks_changes_loss_and_gradients(kind: str) -> None:
    model, batch = build(kind), make_batch(37)
    losses, found = [], []
    for chunk_tokens in (1, 4, 16, 64):
        loss = our_loss(model, batch, chunk_tokens)
        losses.append(loss.item())
        found.append(gradients(model, loss))
    # fp32: 37 terms of about 4.6, and gradients of the order of 1, in another order.
    assert max(losses) - min(losses) <= 1e-6 * max(losses)
    for other in found[1:]:
        assert_same_gradients(other, found[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["untied", "saved head", "adapted head", "soft cap"])
def test_a_chunk_takes_the_bytes_per_logit_that_plans_count(kind: str) -> None:
    """In bf16 10: so many chunks of thousands of targets are planned with on GPUs."""
    model, batch = build(kind), make_batch(NUM_TOKENS)
    peaks = {}
    for chunk_tokens in (10, 20):
        with PeakMemory() as memory, torch.autocast("cpu", torch.bfloat16):
            our_loss(model, batch, chunk_tokens)
        peaks[chunk_tokens] = memory.peak
    shape = planned_shape("meta-llama/Llama-3.1-8B")
    per_logit = bytes_per_target(workload(shape=shape, chunk_tokens=1024)) / shape.vocab
    assert per_logit == 10
    # A target has its number, its loss and its hidden state too, which are nothing beside a vocabulary.
    assert (peaks[20] - peaks[10]) / 10 <= per_logit * VOCABULARY + 4 * SHAPE["hidden_size"]


def test_factors_in_16_bits_are_added_to_a_sum_in_fp32_by_one_product_where_a_device_has_it() -> None:
    """On any device but a CPU; of the meta device, which has no values, shapes and dtypes are checked. Values: tests/gpu."""
    total, left, right = (torch.empty(shape, device="meta") for shape in ((5, 3), (5, 4), (4, 3)))
    with Operations() as operations:
        add_product(total, left.bfloat16(), right.bfloat16())
    assert [name for name in operations.names if "mm" in name] == ["addmm"]
    assert not any(name.startswith("add_") for name in operations.names), "no second matrix, and no sum of two"


class Operations(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = (leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.num_elements = max(self.num_elements, *sizes, 0)
        return result


@pytest.mark.parametrize("kind", ["untied", "tied", "frozen head", "adapted head", "saved head", "logits divided"])
def test_chunks_never_hold_the_logits_of_all_targets(kind: str) -> None:
    num_targets, chunk_tokens = 36, 4
    model, batch = build(kind), make_batch(num_targets)
    with LargestTensor() as largest:
        gradients(model, our_loss(model, batch, chunk_tokens))
    assert largest.num_elements < num_targets * VOCABULARY
    with LargestTensor() as largest:
        gradients(model, our_loss(model, batch, None))
    assert largest.num_elements == num_targets * VOCABULARY  # and never those of positions that are no target


@pytest.mark.parametrize("chunk_tokens", [None, 8])
def test_evaluation_computes_the_same_value_and_keeps_no_graph(chunk_tokens: int | None) -> None:
    for kind in ("untied", "adapted head", "soft cap"):
        model, batch = build(kind).eval(), make_batch(23)
        with torch.no_grad():
            loss = our_loss(model, batch, chunk_tokens)
            torch.testing.assert_close(loss, defined_loss(model, batch), rtol=2e-6, atol=0)
        assert not loss.requires_grad


@pytest.mark.parametrize("kind", ["untied", "saved head", "adapted head", "soft cap"])
@pytest.mark.parametrize("how", ["bf16 weights", "bf16 autocast", "fp16 autocast"])
def test_chunks_in_16_bits_are_as_near_to_the_truth_as_all_logits_are(kind: str, how: str) -> None:
    truth, model = build(kind).double(), build(kind)
    if how == "bf16 weights":
        model.bfloat16()
    dtype = torch.float16 if how.startswith("fp16") else torch.bfloat16
    squared_errors = {1: 0.0, None: 0.0}
    for batch in [make_batch(38, seed) for seed in range(5)]:
        exact = gradients(truth, defined_loss(truth, batch))
        for chunk_tokens in squared_errors:
            with torch.autocast("cpu", dtype, enabled="autocast" in how):
                loss = our_loss(model, batch, chunk_tokens)
            computed = gradients(model, loss)
            squared_errors[chunk_tokens] += sum(float((computed[name] - value).norm() ** 2) for name, value in exact.items())
    # Two samples of the same rounding noise: over these batches the ratio is 0.84 to 1.07. Sums in bf16 make it 1.4 to 1.8.
    assert squared_errors[1] ** 0.5 <= 1.2 * squared_errors[None] ** 0.5


def test_fp16_gradients_of_many_targets_do_not_overflow_before_the_loss_is_divided() -> None:
    # 30 targets of the same token, hidden states of 4,000: their sum is beyond fp16, a thousandth of it is not.
    head = nn.Linear(4, 3, bias=False)
    model = Bare(head)
    hidden = torch.full((1, 30, 4), 4000.0)
    batch = SimpleNamespace(target_positions=torch.arange(30), target_ids=torch.zeros(30, dtype=torch.long), target_weights=None)
    with torch.autocast("cpu", torch.float16):
        loss = attach_loss(model, 10).loss_sum(model, batch, {"hidden": hidden})  # pyright: ignore[reportArgumentType]
    (loss / 1000).backward()
    assert head.weight.grad is not None
    assert head.weight.grad.isfinite().all()


def test_dropout_in_an_adapted_head_is_applied() -> None:
    torch.manual_seed(0)
    model, batch = adapted(plain(), target_modules=["lm_head"], lora_dropout=0.5).train(), make_batch(23)

    def loss(chunk_tokens: int | None) -> Tensor:
        torch.manual_seed(1)
        return our_loss(model, batch, chunk_tokens)

    whole, one_chunk = loss(None), loss(23)
    torch.testing.assert_close(one_chunk, whole, rtol=2e-6, atol=0)
    assert_same_gradients(gradients(model, loss(23)), gradients(model, loss(None)), atol=1e-6)
    model.eval()
    assert abs(float((loss(23) - one_chunk).detach())) > 1e-2


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    model, batch = build("untied"), make_batch(23)
    theirs = gradients(model, our_loss(model, batch, 7))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # pyright: ignore[reportCallIssue]
    model.enable_input_require_grads()  # pyright: ignore[reportCallIssue]
    ours = gradients(model, our_loss(model, batch, 7))
    # Recomputed, not computed differently.
    assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())


def test_a_compiled_model_is_not_compiled_again_for_every_number_of_targets() -> None:
    torch._dynamo.reset()
    model, compiler = build("untied"), CompileCounter()
    model.compile(backend=compiler)
    layer = attach_loss(model, 5)
    frames = []
    for num_targets in (20, 7, 0, 13, 1, 31):
        batch = make_batch(num_targets, seed=num_targets)
        torch.testing.assert_close(layer.loss_sum(model, batch, inputs_of(batch)), defined_loss(build("untied"), batch))
        frames.append(compiler.frame_count)
    assert frames[0] > 0
    assert len(set(frames)) == 1


def test_the_model_is_left_as_it_was() -> None:
    for kind in ("untied", "adapted head", "saved head"):
        model, batch = build(kind), make_batch(5)
        before = [(dict(module._forward_hooks), "forward" in module.__dict__) for module in model.modules()]
        our_loss(model, batch, 2)
        with pytest.raises(IndexError):  # a failing forward pass cleans up too
            our_loss(model, replace(batch, target_positions=torch.tensor([10**6])), 2)
        assert before == [(dict(module._forward_hooks), "forward" in module.__dict__) for module in model.modules()]
        assert model(**inputs_of(batch)).logits.shape == (1, NUM_TOKENS, VOCABULARY)


class Bare(nn.Module):
    """A model of a head alone."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, hidden: Tensor | None = None, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=self.head(hidden))


class PastTheHead(Bare):
    def forward(self, hidden: Tensor, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=F.linear(hidden, self.head.weight))  # pyright: ignore[reportArgumentType]


class Truncating(Bare):
    def forward(self, hidden: Tensor | None = None, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=self.head(hidden)[..., :3])


def test_a_model_that_does_not_call_its_head_is_refused() -> None:
    model = PastTheHead(nn.Linear(4, 5))
    with pytest.raises(ModelError, match="without calling its output head"):
        attach_loss(model, None).loss_sum(model, make_batch(3), {"hidden": torch.randn(1, NUM_TOKENS, 4)})


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear has no output head"):
        attach_loss(nn.Linear(2, 2), None)


def test_logits_that_cannot_be_chunked_are_refused_with_the_way_out() -> None:
    with pytest.raises(ModelError, match=r"Set training\.loss to full.*shape"):
        attach_loss(Truncating(nn.Linear(4, 5)), 8)
    attach_loss(Truncating(nn.Linear(4, 5)), None)


# --- ZeRO-3: weights and gradients divided between two processes

SHARDED_CASES = [("untied", None), ("tied", 8), ("adapted head", 8), ("DoRA on the head", 8), ("saved head", 8)]
OTHER_CASES = [("untied", 8), ("adapted head", None), ("adapted head and soft cap", 8)]
TARGETS = [(23, 0), (9, 17), (0, 5), (20, 20)]
"""Targets of rank 0 and rank 1 per step, so that they differ in their number of chunks."""
RATE = 0.1


def unsharded_gradients(kind: str) -> list[dict[str, Tensor]]:
    """Per step, of all targets in one process, with a step of gradient descent after each."""
    model, steps = build(kind), []
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for step, sizes in enumerate(TARGETS):
        losses = [defined_loss(model, make_batch(size, 10 * step + rank)) for rank, size in enumerate(sizes)]
        steps.append(gradients(model, sum(losses) / sum(sizes) * 7))  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            for name, weight in trained.items():
                weight -= RATE * steps[-1][name]
    return steps


def sharded_errors(cases: list[tuple[str, int | None]]) -> dict[tuple[str, int | None], float]:
    """Largest difference of a gradient from the unsharded one, by case."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore[reportAttributeAccessIssue]
    deepspeed.init_distributed("gloo", verbose=False)
    rank, errors = torch.distributed.get_rank(), {}
    for kind, chunk_tokens in cases:
        model = build(kind)
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 2000}
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(trained.values(), lr=RATE),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": 0.0,
                "zero_optimization": zero,
            },
        )
        layer, error = attach_loss(model, chunk_tokens), 0.0
        for step, (sizes, expected) in enumerate(zip(TARGETS, unsharded_gradients(kind))):
            batch = make_batch(sizes[rank], 10 * step + rank)
            if step == 2:  # an evaluation in between must not upset the order in which weights are gathered
                with torch.no_grad():
                    layer.loss_sum(engine, batch, inputs_of(batch))
            loss = layer.loss_sum(engine, batch, inputs_of(batch))
            # DeepSpeed averages over the two ranks.
            engine.backward(loss / sum(sizes) * 2, scale_wrt_gas=False)
            for name, weight in trained.items():
                error = max(error, float((safe_get_full_grad(weight) - expected[name]).abs().max()))
            engine.step()
        errors[kind, chunk_tokens] = error
    return errors


@pytest.mark.parametrize("cases", variants([SHARDED_CASES], [(OTHER_CASES,)]), ids=["some cases", "other cases"])
def test_gradients_under_zero_3_are_those_of_one_process(cases: list[tuple[str, int | None]]) -> None:
    for errors in run_on_ranks(sharded_errors, 2, cases):
        # fp32: gradients of the order of 1, summed in another order.
        assert {which: error for which, error in errors.items() if error > 1e-6} == {}
        assert len(errors) == len(cases)
