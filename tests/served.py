"""Models to serve, what plain transformers and PEFT make of prompts, and schedules by which requests come."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig

from raytune.evaluation.generation import without_position_warnings
from raytune.model.demo import demo_config
from raytune.plan.saved.asked_model import AskedModel, plain_model
from raytune.serving.engine import AnsweringEngine
from raytune.serving.requests import Piece, Request, Token
from tests.hybrids import HYBRIDS
from tests.tiny import TINY_SHAPE, tiny_tokenizer

PATIENCE_S = 120.0
LONGEST = 24
STOPS = [2, 65, 101, 116, 200, 201, 202, 203]
"""Ids at which answers of the models here end; some end soon."""
LAYERS_WITH_STATES = "recurrent_gemma"
_SMALL: dict[str, Any] = {"vocab_size": 259, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SHAPE: dict[str, Any] = TINY_SHAPE
_THREE_LAYERS: dict[str, Any] = {**TINY_SHAPE, "num_hidden_layers": 3}
_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 24,
}


def _llama(**config: Any) -> PretrainedConfig:
    return demo_config(**(_SHAPE | {"initializer_range": 0.3} | config))


BASES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _llama,
    "gpt2, which has absolute positions": lambda: transformers.GPT2Config(
        **_SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=256
    ),
    "bloom, which has distances": lambda: transformers.BloomConfig(**_SMALL, hidden_size=32, n_layer=2, n_head=4),
    "mistral, which has a window": lambda: transformers.MistralConfig(**_SMALL, **_SHAPE, sliding_window=8, head_dim=8),
    "gemma3, some of whose layers have a window": lambda: transformers.Gemma3TextConfig(
        **_SMALL,
        **_THREE_LAYERS,
        sliding_window=8,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "longrope, where the longest row decides": lambda: _llama(rope_parameters=_ROPE),
    **{name: config for name, config in HYBRIDS.items() if name != LAYERS_WITH_STATES},
}
LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
ADAPTERS: dict[str, PeftConfig] = {
    "first": LoraConfig(r=2, **LORA),
    "second": LoraConfig(r=4, lora_alpha=8, **{**LORA, "target_modules": ["v_proj"]}),
    "third": LoraConfig(r=8, **LORA),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "biases": LoraConfig(r=2, bias="all", **LORA),
}


def save_base(folder: Path, name: str, **settings: Any) -> Path:
    """Write a base that stops at `STOPS`; `settings` are other fields of its generation_config.json."""
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config((BASES | HYBRIDS)[name]())
    model.generation_config = transformers.GenerationConfig(eos_token_id=STOPS, pad_token_id=0, **settings)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, name: str, *, std: float = 0.3) -> Path:
    torch.manual_seed(len(name))
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), ADAPTERS[name])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_().mul_(std)
    model.save_pretrained(folder)
    return folder


def asked(base: Path, adapter: Path | None = None, *, can_pad: bool = True) -> AskedModel:
    return AskedModel(
        name="asked", model=plain_model(str(base), "fp32"), adapter=str(adapter) if adapter else None, can_pad=can_pad
    )


@cache
def prompts(number: int = 8, longest: int = 40) -> list[tuple[int, ...]]:
    """Prompts of different lengths, one of them a token long."""
    random = torch.Generator().manual_seed(1)
    lengths = [1, *torch.randint(2, longest, (number - 1,), generator=random).tolist()]
    return [tuple(torch.randint(3, 250, (length,), generator=random).tolist()) for length in lengths]


class Plain:
    """What plain transformers and PEFT write, one prompt by itself."""

    def __init__(self, base: Path, adapter: Path | None = None) -> None:
        self._base, self._adapter = base, adapter
        self._known: dict[tuple[Any, ...], list[int]] = {}

    @cached_property
    def model(self) -> Any:
        base = AutoModelForCausalLM.from_pretrained(self._base)
        return (PeftModel.from_pretrained(base, str(self._adapter)) if self._adapter else base).eval()

    def ids(self, prompt: Sequence[int], max_new_tokens: int, **settings: Any) -> list[int]:
        """New tokens, with the one that ends them; `settings` are of `generate`."""
        key = (tuple(prompt), max_new_tokens)
        if key not in self._known:
            ids = torch.tensor([prompt])
            asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": max_new_tokens, "do_sample": False} | settings
            with without_position_warnings():
                self._known[key] = self.model.generate(input_ids=ids, **asked)[0, len(prompt) :].tolist()
        return self._known[key]


@dataclass(eq=False)
class Heard:
    """What was told of one request."""

    pieces: list[Piece] = field(default_factory=list)
    error: Exception | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def __call__(self, what: Piece | Exception) -> None:
        assert not self.over.is_set(), "something was told behind the last piece"
        if isinstance(what, Exception):
            self.error = what
        else:
            self.pieces.append(what)
        if isinstance(what, Exception) or what.finish:
            self.over.set()

    def wait(self) -> "Heard":
        assert self.over.wait(PATIENCE_S), "nobody answers"
        return self

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> list[Token]:
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def finish(self) -> str | None:
        assert self.error is None, self.error
        return self.pieces[-1].finish


@dataclass(frozen=True)
class Arrival:
    """A request that comes once an earlier one has been told of so many pieces, or is over."""

    request: Request
    after: tuple[int, int] | None = None
    """The earlier one's place, and the pieces; None: at once."""


def play(engine: AnsweringEngine, arrivals: Sequence[Arrival]) -> list[Heard]:
    """Have requests come as they are to, and wait for all. Those that come later are submitted from within a delivery, so that
    what the engine does is the same each time."""
    heard = [Heard() for _ in arrivals]
    left = {place: arrival for place, arrival in enumerate(arrivals) if arrival.after}

    def told(place: int, what: Piece | Exception) -> None:
        heard[place](what)
        is_over, number = heard[place].over.is_set(), len(heard[place].pieces)
        for other, arrival in list(left.items()):
            assert arrival.after
            if arrival.after[0] == place and (is_over or number >= arrival.after[1]):
                del left[other]
                submit(other)

    def submit(place: int) -> None:
        engine.submit(arrivals[place].request, lambda what: told(place, what))

    for place, arrival in enumerate(arrivals):
        if not arrival.after:
            submit(place)
    return [one.wait() for one in heard]


def expect(heard: Heard, request: Request, plain: Plain) -> None:
    """An answer is what plain transformers write, token by token where these are told, and its text what these decode to."""
    assert heard.error is None, heard.error
    ids = plain.ids(request.prompt, LONGEST)[: request.max_new_tokens]
    stopped = ids[-1] in STOPS
    assert heard.finish == ("stop" if stopped else "length")
    assert heard.pieces[-1].num_tokens == len(ids)
    ids = ids[:-1] if stopped else ids
    if request.num_logprobs is not None:
        assert [token.id for token in heard.tokens] == ids
    decoder = tiny_tokenizer()
    assert heard.text == decoder.decode([one for one in ids if one not in decoder.all_special_ids])


def all_plain(models: Mapping[str, AskedModel]) -> dict[str, Plain]:
    return {name: Plain(Path(one.model.path), Path(one.adapter) if one.adapter else None) for name, one in models.items()}
