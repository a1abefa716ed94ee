"""The serving engine against what else answers 64 requests that come together: tokens per CPU second.

    python -m tests.bench.serving_engine --output

Prompts of 8 to 256 tokens and answers of 8 to 64, drawn independently, greedy; on the demo base and on a random Llama of 8 layers
and width 512. The rivals are plain transformers: `generate` a request at a time; in padded batches of 16 of similar length, each
as long as its longest answer; and its continuous batching, made small enough to start in a second. Who is ready is not measured,
only who answers. `base and three adapters` has the engine answer a quarter of the requests with each.
"""

import argparse
import os
import statistics
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from raytune.model.demo import demo_base_path
from raytune.plan.saved.asked_model import AskedModel, plain_model
from raytune.plan.saved.serving import EngineLimits
from raytune.serving.engine import AnsweringEngine
from raytune.serving.requests import Piece, Request
from tests.bench.measure import Rival, interleaved, ratios, report
from tests.tiny import save_tiny_model

NUM, BATCH = 64, 16
PROMPTS, ANSWERS = (8, 257), (8, 65)
ALONE, BY_PROMPT, BY_ANSWER, CONTINUOUS = (
    "a request at a time",
    "batches by prompt",
    "batches by answer",
    "transformers' continuous",
)
OURS, MIXED = "raytune", "raytune, base and three adapters"
ADAPTERS = ("base", "first", "second", "third")
LIMITS = EngineLimits(most_at_once=32, most_waiting=64)


class Work:
    """Requests, and the ways to have them answered: each gives new tokens in the order of the requests."""

    def __init__(self, base: Path) -> None:
        random = torch.Generator().manual_seed(0)
        self.base = base
        self.lengths = torch.randint(*PROMPTS, (NUM,), generator=random).tolist()
        self.wanted = torch.randint(*ANSWERS, (NUM,), generator=random).tolist()
        self.prompts = [torch.randint(0, 256, (length,), generator=random).tolist() for length in self.lengths]
        self.model: Any = AutoModelForCausalLM.from_pretrained(base).eval()
        # As many tokens as wanted from everybody.
        self.model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)

    def batches(self, order: list[int], size: int) -> Callable[[], list[list[int]]]:
        return lambda: self._batches(order, size)

    @torch.inference_mode()
    def _batches(self, order: list[int], size: int) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in self.prompts]
        for start in range(0, NUM, size):
            rows = order[start : start + size]
            longest = max(self.lengths[row] for row in rows)
            ids = torch.zeros(len(rows), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(rows):
                ids[place, longest - self.lengths[row] :] = torch.tensor(self.prompts[row])
                mask[place, longest - self.lengths[row] :] = 1
            most = max(self.wanted[row] for row in rows)
            written = self.model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False)[:, longest:].tolist()
            for row, found in zip(rows, written, strict=True):
                answers[row] = found[: self.wanted[row]]
        return answers

    def continuous(self) -> Callable[[], list[list[int]]]:
        model: Any = AutoModelForCausalLM.from_pretrained(self.base).eval()
        settings = GenerationConfig(eos_token_id=-1, pad_token_id=0, do_sample=False)
        small = ContinuousBatchingConfig(num_blocks=128, max_batch_tokens=LIMITS.most_prefilled)
        manager = model.init_continuous_batching(generation_config=settings, continuous_batching_config=small)
        manager.start()

        def work() -> list[list[int]]:
            names = [
                manager.add_request(prompt, max_new_tokens=most) for prompt, most in zip(self.prompts, self.wanted, strict=True)
            ]
            found: dict[str, list[int]] = {}
            while len(found) < NUM:
                one = manager.get_result(timeout=60)
                assert one is not None
                found[one.request_id] = one.generated_tokens
            manager.stop(block=True)
            return [found[name] for name in names]

        return work

    def engine(self, models: dict[str, AskedModel]) -> Callable[[], list[list[int]]]:
        engine, names = AnsweringEngine(models, limits=LIMITS), list(models)

        def work() -> list[list[int]]:
            answers: list[list[int]] = [[] for _ in self.prompts]
            left = threading.Semaphore(0)

            def told(place: int, what: Piece | Exception) -> None:
                assert isinstance(what, Piece), what
                answers[place] += [token.id for token in what.tokens]
                if what.finish:
                    left.release()

            for place, (prompt, most) in enumerate(zip(self.prompts, self.wanted, strict=True)):
                request = Request(id=str(place), model=names[place % len(names)], prompt=tuple(prompt), max_new_tokens=most)
                engine.submit(request, lambda what, place=place: told(place, what))
            for _ in self.prompts:
                left.acquire()
            engine.close()
            return answers

        return work


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", action="store_true", help="append to the baselines")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["demo", "8x512"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
        large = save_tiny_model(Path(scratch) / "large", **shape, num_key_value_heads=4, max_position_embeddings=2048)
        for name, base in (("demo", Path(demo_base_path())), ("8x512", large)):
            if arguments.only in (None, name):
                _measure(name, base, Path(scratch) / name, arguments.rounds, arguments.output)


def _measure(name: str, base: Path, scratch: Path, rounds: int, output: bool) -> None:
    work = Work(_without_end(base, scratch / "base"))
    whole = AskedModel(name="base", model=plain_model(str(work.base), "fp32"))
    models = {"base": whole} | {
        one: whole.model_copy(update={"adapter": str(_save_adapter(work.base, scratch / one))}) for one in ADAPTERS[1:]
    }
    by_prompt = sorted(range(NUM), key=lambda row: work.lengths[row])
    by_answer = sorted(range(NUM), key=lambda row: work.wanted[row])
    rivals: dict[str, Rival] = {
        ALONE: lambda: work.batches(list(range(NUM)), 1),
        BY_PROMPT: lambda: work.batches(by_prompt, BATCH),
        BY_ANSWER: lambda: work.batches(by_answer, BATCH),
        CONTINUOUS: work.continuous,
        OURS: lambda: work.engine({"base": whole}),
        MIXED: lambda: work.engine(models),
    }
    seconds = interleaved(rivals, rounds)
    report(
        "serving_engine",
        {
            "model": name,
            "tokens_per_cpu_s": {rival: round(sum(work.wanted) / statistics.median(found)) for rival, found in seconds.items()},
            "cpu_s_of_ours_against": {rival: ratios(seconds[OURS], found) for rival, found in seconds.items() if rival != OURS},
            "requests": NUM,
            "rounds": rounds,
        },
        output,
    )


def _without_end(base: Path, folder: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config = GenerationConfig(pad_token_id=0)
    model.config.eos_token_id = None
    model.save_pretrained(folder)
    for file in base.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _save_adapter(base: Path, folder: Path) -> Path:
    config = LoraConfig(r=8, task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
