"""`model`: which weights to start from and how the model computes."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from raytune.config.sections.section import Auto, PositiveFloat, PositiveInt, Section, Text

Attention = Literal["flash_attention_2", "flash_attention_3", "varlen", "flex_attention", "sdpa", "eager"]
QuantFormat = Literal["nf4", "fp4", "int8"]
"""Number formats of bitsandbytes that a frozen base can be held in."""
ComputeDtype = Literal["bf16", "fp16", "fp32"]
QuantStorage = Literal["uint8", "bf16", "fp16", "fp32"]


class Quantization(Section):
    """How a frozen base is held by bitsandbytes, whichever section of a config said so."""

    format: QuantFormat = "nf4"
    """Number format: of linear layers and, in 4 bits, of fused experts without an update."""
    double_quantization: bool = True
    """Whether the 4-bit scales are quantised too."""
    compute_dtype: ComputeDtype | Auto = "auto"
    """Dtype that 4-bit weights of linear layers are expanded to; none is `auto` in a plan."""
    quant_storage: QuantStorage | Auto = "auto"
    """Dtype that holds the packed 4-bit numbers; none is `auto` in a plan."""

    @property
    def is_4_bit(self) -> bool:
        return self.format != "int8"


DropoutRate = Annotated[float, Field(ge=0, lt=1, examples=[0.1])]


class DropoutSection(Section):
    """Shares of numbers that training sets to 0, where the base's architecture has such a dropout; null leaves the base's own."""

    attention: DropoutRate | None = None
    """Of the attention probabilities."""
    hidden: DropoutRate | None = None
    """Of what attention and MLP add to the stream."""
    embedding: DropoutRate | None = None
    """Of the embeddings."""


RopeScaling = Literal["linear", "dynamic", "yarn", "llama3"]


class RopeScalingSection(Section):
    """Rotary positions of the base, stretched to longer documents than it was trained with; keys as transformers names them."""

    type: RopeScaling
    """`linear`: all frequencies by the factor (position interpolation). `dynamic`: a base of the frequencies that grows with a
    document's length, and leaves documents of the original length as they were. `yarn`: low frequencies by the factor, high ones
    not at all, and scores tempered (Peng et al. 2023). `llama3`: as Llama 3.1 does it, between two bounds of frequency."""
    factor: Annotated[float, Field(ge=1, examples=[4.0])]
    """How many times longer than the original length documents may be; 1 stretches nothing."""
    original_max_position_embeddings: Annotated[PositiveInt | Auto, Field(examples=[8192])] = "auto"
    """Positions that the base was first trained with. `auto`: those of its config."""
    attention_factor: Annotated[PositiveFloat | None, Field(examples=[1.1])] = None
    """What rotated queries and keys are multiplied by; without it, 0.1 x ln(factor) + 1."""
    beta_fast: Annotated[PositiveFloat | None, Field(examples=[32.0])] = None
    """Rotations over the original length from which on a frequency stays as it is; without it, 32."""
    beta_slow: Annotated[PositiveFloat | None, Field(examples=[1.0])] = None
    """Rotations up to which a frequency is divided by the whole factor; without it, 1."""
    mscale: Annotated[PositiveFloat | None, Field(examples=[1.0])] = None
    """With `mscale_all_dim`, in place of `attention_factor`: the weight of ln(factor) in it, as DeepSeek has it."""
    mscale_all_dim: Annotated[PositiveFloat | None, Field(examples=[1.0])] = None
    """The weight of ln(factor) in what `mscale`'s term is divided by."""
    truncate: bool | None = None
    """Whether the bounds between frequencies are rounded to whole dimensions; without it, they are."""
    low_freq_factor: Annotated[PositiveFloat | None, Field(examples=[1.0])] = None
    """Rotations over the original length up to which a frequency is divided by the whole factor."""
    high_freq_factor: Annotated[PositiveFloat | None, Field(examples=[4.0])] = None
    """Rotations from which on a frequency stays as it is."""

    @model_validator(mode="after")
    def _is_complete(self) -> "RopeScalingSection":
        if self.type == "llama3" and (self.low_freq_factor is None or self.high_freq_factor is None):
            raise ValueError("type llama3 needs low_freq_factor and high_freq_factor; Llama 3.1 has 1 and 4")
        if self.low_freq_factor and self.high_freq_factor and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor {self.low_freq_factor:g} must be below high_freq_factor {self.high_freq_factor:g}")
        fast, slow = self.beta_fast or 32, self.beta_slow or 1
        if fast <= slow:
            raise ValueError(f"beta_slow {slow:g} must be below beta_fast {fast:g} (without them: 1 and 32)")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError("mscale and mscale_all_dim go together: transformers reads neither of them alone")
        if self.mscale is not None and self.attention_factor is not None:
            raise ValueError("attention_factor says what mscale and mscale_all_dim would: give one or the other")
        return self


class NewToken(Section):
    """A token that the tokenizer of the base does not have."""

    token: Annotated[Text, Field(examples=["<tool>"])]
    """Its text, which is one token from then on, wherever it stands."""
    description: Annotated[Text | None, Field(examples=["calls a tool"])] = None
    """What it means, in words: its rows start as the mean of those of the words' tokens; without it, as the mean of all."""
    special: bool = True
    """Whether decoding leaves it out together with the special tokens, as most programs that serve a model have it."""

    @field_validator("token", mode="before")
    @classmethod
    def _is_seen(cls, token: object) -> object:
        if isinstance(token, str) and not token.strip():
            raise ValueError("must have at least one character that is no white space")
        if isinstance(token, str) and (token != token.strip() or not token.isprintable()):
            raise ValueError("must neither begin nor end with white space, nor have characters that are not printed")
        return token


def _as_tokens(value: object) -> object:
    tokens = value if isinstance(value, list) else [value]
    return [{"token": token} if isinstance(token, str) else token for token in tokens]


NewTokens = Annotated[
    list[NewToken],
    BeforeValidator(_as_tokens, json_schema_input_type=str | NewToken | list[str | NewToken]),
    Field(title="a text, a token (token, description, ...), or a list of them", examples=["<tool>"]),
]


class ModelSection(Section):
    base: Text = "demo"
    """Model to start from: a local folder, a Hugging Face hub id, or `demo` for the tiny model that ships with raytune. A run has
    to name it, unless its rows are the demo's. What a node lacks of a hub model it downloads into its cache (HF_HUB_CACHE), with
    its own login (HF_TOKEN, or `hf auth login`)."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model. A branch stands for the commit that it had when it was first asked for on this
    machine; a commit makes the run reproducible elsewhere."""
    attention: Attention | Auto = "auto"
    """Attention kernel. `auto` takes FlashAttention where it is installed, else `varlen` (PyTorch kernels, one call per
    document). `sdpa` and `eager` build a dense mask over the packed row and pay for the other documents' keys."""
    quantization: QuantFormat | Literal["none"] | Auto = "auto"
    """Number format that bitsandbytes holds the frozen base in, whatever is trained over it: its linear layers and, in 4 bits,
    fused experts without an update. `auto` is `none`, unless `adapter.method` is `qlora`, which says it itself."""
    double_quantization: bool | Auto = "auto"
    """Quantise the 4-bit scales too (saves about 0.4 bit per parameter); `auto` does."""
    quant_compute_dtype: ComputeDtype | Auto = "auto"
    """Dtype that 4-bit weights of linear layers are expanded to for a product; experts are expanded to the run's precision, as
    here with `auto`."""
    quant_storage: QuantStorage | Auto = "auto"
    """Dtype that holds the packed 4-bit numbers. ZeRO-3 shards the base only if it equals the compute dtype, which `auto`
    chooses."""
    new_tokens: NewTokens = []
    """Tokens that are added to the tokenizer, and get rows of embedding and head: a list of texts, or of token and description.
    Full fine-tuning trains these rows; LoRA does by `adapter.trainable_tokens`, other adapters by `adapter.modules_to_save`."""
    vocabulary_multiple: Annotated[PositiveInt, Field(examples=[64])] = 1
    """Where new tokens need more rows than the base has, round their number up to a multiple of this: 64 suits GPUs."""
    rope_scaling: Annotated[RopeScalingSection | None, Field(examples=[{"type": "yarn", "factor": 4.0}])] = None
    """Stretch the base's rotary positions, so that `data.max_length` may be up to the factor times the original length. In place
    of a scaling that its config has already. A whole or merged model that is saved has it in its config."""
    dropout: DropoutSection = DropoutSection()
    """Dropout of the base in training, in place of what its config says. The saved model keeps the base's own."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. A hub model needs `revision` to be a full commit hash; that of a local folder is
    part of the run, as its weights are."""

    @field_validator("new_tokens")
    @classmethod
    def _each_token_once(cls, tokens: list[NewToken]) -> list[NewToken]:
        texts = [one.token for one in tokens]
        if twice := next((text for text in texts if texts.count(text) > 1), None):
            raise ValueError(f"names {twice!r} twice")
        return tokens

    @model_validator(mode="after")
    def _remote_code_is_pinned(self) -> "ModelSection":
        if self.trust_remote_code:
            check_code_is_pinned("model", self.base, self.revision)
        return self


def check_code_is_pinned(section: str, base: str, revision: str | None) -> None:
    """Refuse to run the code of a hub model that may be another tomorrow.

    Args:
        section: that names the model.

    Raises:
        ValueError: with what to set.
    """
    is_pinned = revision is not None and len(revision) == 40 and set(revision) <= set("0123456789abcdef")
    if not is_pinned and not is_written_as_path(base) and base != "demo":
        raise ValueError(
            f"trust_remote_code: true needs {section}.revision to be a full 40-digit commit hash; a local folder, which has none,"
            f" is written as a path, such as ./{base}"
        )


def is_written_as_path(base: str) -> bool:
    """Whether a base can only be a folder: a hub id is a name, or an owner and a name."""
    return base.startswith((".", "/", "~")) or base.count("/") > 1
