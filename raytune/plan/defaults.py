"""What a setting is when the config leaves it to the method, the model and the data. Each rule names where it comes from."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from raytune.units import format_count

Value = TypeVar("Value", covariant=True)


@dataclass(frozen=True, slots=True)
class Choice(Generic[Value]):
    """A value, and why it was chosen; no reason: the user chose it."""

    value: Value
    reason: str | None = None


# (parameters from, full fine-tuning, adapters). Full: 2e-5 for 7B and 13B, 1e-5 for 70B (Tulu 2, Ivison et al. 2023; 2e-5 for
# Llama 2 chat, Touvron et al. 2023). Adapters: 2e-4 for 7B and 13B, 1e-4 above (QLoRA, Dettmers et al. 2023), ten times the rate
# of full fine-tuning, as "LoRA Without Regret" (Schulman et al. 2025) measured it. Below 1B the best rate grows about as one
# over the width (Yang et al. 2022, Tensor Programs V); the last two lines continue the table that way and are not published.
_RATES = [(30e9, 1e-5, 1e-4), (1e9, 2e-5, 2e-4), (50e6, 5e-5, 5e-4), (0, 5e-4, 5e-3)]

# (target tokens from, epochs of full fine-tuning, epochs of adapters). 3 is Alpaca's number (Taori et al. 2023, 52k rows) and
# QLoRA's on OASST1 within a third; Tulu 2 takes 2 on 326k rows. Small sets need more passes to be learned at all (LIMA, Zhou et
# al. 2023: 15 on 1k rows), and adapters forget less meanwhile (Biderman et al. 2024, LoRA Learns Less and Forgets Less).
_EPOCHS = [(100e6, 1.0, 1.0), (10e6, 2.0, 2.0), (1e6, 3.0, 3.0), (0, 3.0, 5.0)]

SHORT_RUN_STEPS = 200


def full_rate(num_parameters: int) -> float:
    """Peak rate of full fine-tuning by size of the base model."""
    return next(full for least, full, _ in _RATES if num_parameters >= least)


def adapter_rate(num_parameters: int) -> float:
    """Peak rate of low-rank updates by size of the base model."""
    return next(adapter for least, _, adapter in _RATES if num_parameters >= least)


def full_epochs(num_targets: int) -> float:
    """Passes over the data of full fine-tuning by target tokens."""
    return next(full for least, full, _ in _EPOCHS if num_targets >= least)


def adapter_epochs(num_targets: int) -> float:
    """Passes over the data of adapters by target tokens."""
    return next(adapter for least, _, adapter in _EPOCHS if num_targets >= least)


def default_learning_rate(method: str, rate: float, num_parameters: int) -> Choice[float]:
    """A method's usual peak rate for a base model of this size, with its words."""
    return Choice(
        rate, f"training.learning_rate is {rate:g}, the usual rate of {method} for {format_count(num_parameters)} parameters."
    )


def default_epochs(method: str, epochs: float, num_targets: int) -> Choice[float]:
    """A method's usual passes over data of this size, with their words."""
    return Choice(
        epochs, f"training.num_train_epochs is {epochs:g}: {method} on {format_count(num_targets)} target tokens per pass."
    )


def default_warmup_ratio(num_steps: int) -> Choice[float]:
    """3 % (QLoRA and Tulu 2 alike), 10 % in a short run, where 3 % would be a handful of steps."""
    is_short = num_steps < SHORT_RUN_STEPS
    ratio = 0.1 if is_short else 0.03
    return Choice(
        ratio,
        f"training.warmup_ratio is {ratio:g}: the run has {'fewer than' if is_short else 'at least'} {SHORT_RUN_STEPS} steps.",
    )


def default_weight_decay(method: str, decay: float) -> Choice[float]:
    """A method's usual weight decay, with its words."""
    return Choice(decay, f"training.weight_decay is {decay:g}, the usual value of {method}.")
