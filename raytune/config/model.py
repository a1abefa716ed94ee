"""`model`: which weights to start from and how the model computes."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from raytune.config.section import Auto, PositiveInt, Section, Text

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
