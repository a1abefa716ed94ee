"""LoRA over a base that two gloo ranks hold whole, divide among themselves, or shard by ZeRO-3: CPU seconds of a step.

    python -m tests.bench.sharded_base --output

A random Llama of 12 layers, width 256 and a vocabulary of 4k, all linear layers updated at rank 16, rows of 512 tokens, in fp32.
A whole base and a divided one make steps in turn, ZeRO-3 after them; the losses of the last step are compared.
"""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from raytune.data.batches.batches import Batch
from raytune.plan.run_plan import RunPlan
from raytune.training.start.start import prepare_process, start_engine
from tests.bench.measure import interleaved, ratios, report
from tests.numerics.processes import run_on_ranks
from tests.tiny import tiny_plan, tiny_tokenizer

RANK, VOCABULARY = 16, 4096
WHOLE, SHARDED, ZERO_3 = "whole", "layers divided", "ZeRO-3"
SAME_SUMS = 1e-6


def save_model(folder: Path) -> int:
    """Write the model; its parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def plans(model: Path, num_parameters: int, num_ranks: int, *, recomputes: bool) -> dict[str, RunPlan]:
    engines: dict[str, dict[str, Any]] = {
        WHOLE: {"kind": "plain", "zero_stage": 0},
        SHARDED: {"kind": "plain", "zero_stage": 0, "shards_base": True},
        ZERO_3: {"kind": "zero", "zero_stage": 3},
    }
    return {
        name: tiny_plan(
            model={"path": str(model), "gradient_checkpointing": recomputes},
            adapter={"method": "lora", "rank": RANK, "alpha": 2.0 * RANK, "target_modules": "all-linear"},
            batch={"workers": num_ranks, "micro_batch_size": 1, "accumulation": 1},
            loss={"chunk_tokens": 256},
            engine=engine,
            num_parameters=num_parameters,
            num_trainable=num_parameters,
        )
        for name, engine in engines.items()
    }


def batch_of(rank: int, step: int, num_tokens: int, num_ranks: int) -> Batch:
    """A row of random tokens, each of which predicts the next."""
    ids = torch.randint(0, VOCABULARY, (1, num_tokens), generator=torch.Generator().manual_seed(1000 * step + rank))
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(num_tokens)[None],
        cumulative_lengths=torch.tensor([0, num_tokens], dtype=torch.int32),
        max_document_length=num_tokens,
        target_positions=torch.arange(num_tokens - 1),
        target_ids=ids[0, 1:],
        num_targets_in_step=num_ranks * (num_tokens - 1),
        rows=(0,),
    )


class Way:
    """Steps of one engine on this rank."""

    def __init__(self, plan: RunPlan, num_tokens: int) -> None:
        rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        self.engine, self._loss = start_engine(plan, prepare_process(plan, rank), rank, self._num_ranks)
        self._num_tokens, self._step, self.loss = num_tokens, 0, float("nan")

    def make_step(self) -> None:
        batch = batch_of(self.engine.rank, self._step, self._num_tokens, self._num_ranks)
        with self.engine.autocast():
            loss = self._loss(self.engine.module, batch) / batch.step_weight
        self.loss = self.engine.all_reduce_sum(loss.detach().clone()).item()
        self.engine.backward(loss)
        self.engine.step(1e-3)
        self._step += 1


def measure(asked: dict[str, RunPlan], num_tokens: int, rounds: int) -> dict[str, Any]:
    """On one rank."""
    # DeepSpeed replaces torch's linear function for the rest of a process, so that its engine is made last, and all steps of the
    # others come before.
    seconds: dict[str, list[float]] = {}
    losses, held = {}, {}
    for names in ((WHOLE, SHARDED), (ZERO_3,)):
        ways = {name: Way(asked[name], num_tokens) for name in names}
        for way in ways.values():
            way.make_step()  # makes optimizer state
            way.make_step()
        seconds |= interleaved({name: lambda way=way: way.make_step for name, way in ways.items()}, rounds)
        losses |= {name: way.loss for name, way in ways.items()}
        held |= {name: way.engine.held_bytes().weights for name, way in ways.items()}
    return {"cpu_s": seconds, "losses": losses, "held": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", action="store_true", help="append the figures to tests/bench/baselines/sharded_base.jsonl")
    options = parser.parse_args()
    for recomputes in (False, True):
        with TemporaryDirectory() as folder:
            asked = plans(Path(folder), save_model(Path(folder)), options.ranks, recomputes=recomputes)
            ranks = run_on_ranks(measure, options.ranks, asked, options.tokens, options.rounds, timeout_s=3600)
        seconds = {name: [sum(one) for one in zip(*(rank["cpu_s"][name] for rank in ranks))] for name in asked}
        losses = ranks[0]["losses"]
        assert losses[SHARDED] == losses[WHOLE]
        assert abs(losses[ZERO_3] / losses[WHOLE] - 1) <= SAME_SUMS
        figures = {
            "ranks": options.ranks,
            "tokens": options.tokens,
            "rounds": options.rounds,
            "recomputes": recomputes,
            "cpu_s": {name: [round(one, 3) for one in times] for name, times in seconds.items()},
            "divided_to_whole": ratios(seconds[SHARDED], seconds[WHOLE]),
            "zero_3_to_whole": ratios(seconds[ZERO_3], seconds[WHOLE]),
            "mb_of_weights": {name: round(num_bytes / 1e6, 1) for name, num_bytes in ranks[0]["held"].items()},
            "last_losses": losses,
        }
        report("sharded_base", figures, options.output)


if __name__ == "__main__":
    main()
