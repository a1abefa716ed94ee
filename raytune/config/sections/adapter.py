"""`adapter`: which parameters are trained, as a union tagged by `method`."""

from typing import Annotated, Literal

from pydantic import Field

from raytune.config.sections.model import ComputeDtype, QuantFormat, Quantization, QuantStorage
from raytune.config.sections.section import Auto, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Text

TargetGroup = Literal["all-linear", "attention", "mlp"]


class FullAdapter(Section):
    """Full fine-tuning: every parameter of the base model is trained."""

    method: Literal["full"]
    """Train every parameter."""


class LoraAdapter(Section):
    """LoRA (Hu et al. 2021): a frozen base plus a trained update (alpha / rank) * B @ A on chosen linear layers."""

    method: Literal["lora"] = "lora"
    """Train low-rank updates of linear layers; the base stays frozen."""
    rank: PositiveInt = 16
    """Rank r of the update."""
    alpha: PositiveFloat = 32.0
    """Scale of the update: it is multiplied by alpha / rank (alpha / sqrt(rank) with `use_rslora`)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the update."""
    target_modules: TargetGroup | Text | list[Text] = "all-linear"
    """Layers that get an update: a group (`all-linear`, `attention`, `mlp`), a list of module names, or a regular expression
    that must match a module's whole name. `all-linear` and `mlp` take in the fused experts of a mixture; the output head is never
    part of a group."""
    target_parameters: Annotated[list[Text], Field(examples=[["mlp.experts.down_proj"]])] = []
    """Matrices outside linear layers that get an update as well, by their names or the ends of these: the fused experts of a
    mixture (`mlp.experts.gate_up_proj`, `mlp.experts.down_proj`), or its router."""
    exclude_modules: Annotated[list[Text], Field(examples=[["o_proj"]])] = []
    """Names of modules, and of parameters of fused experts, that `target_modules` would take but that stay frozen."""
    modules_to_save: Annotated[list[Text], Field(examples=[["embed_tokens", "lm_head"]])] = []
    """Modules outside the update that are trained in full and saved with the adapter, such as `embed_tokens` or `lm_head`."""
    trainable_tokens: Annotated[list[Text] | Auto, Field(examples=[["<tool>", "</tool>"]])] = "auto"
    """Tokens whose rows of embedding and head are trained beside the update, and nothing else of these matrices; as the
    tokenizer's vocabulary writes them. `model.new_tokens` are always among them; `auto` takes these, unless
    `modules_to_save` trains both matrices."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained: none, those of layers with an update (`lora_only`), or all of the model's."""
    init: Literal["default", "gaussian", "pissa", "olora", "orthogonal", "eva"] = "default"
    """Start of the update. `default` (Kaiming, B = 0), `gaussian` and `orthogonal` need no weights; `pissa` and `olora`
    factorise the base weights; `eva` looks at the activations of the first training batches."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)."""
    use_dora: bool = False
    """Train a magnitude per output beside the direction (DoRA)."""
    lora_plus_ratio: Annotated[float, Field(ge=1, examples=[16.0])] | None = None
    """LoRA+: the learning rate of B is this many times that of A."""
    lora_plus_embedding_rate: PositiveFloat = 1e-6
    """LoRA+: the peak rate of updates of embeddings, whatever `training.learning_rate` is; the schedule shapes it as well."""
    rank_pattern: Annotated[dict[str, PositiveInt], Field(examples=[{"q_proj": 32}])] = {}
    """Other ranks for modules whose name matches a key (regular expression)."""
    alpha_pattern: Annotated[dict[str, PositiveFloat], Field(examples=[{"q_proj": 64.0}])] = {}
    """Other alphas for modules whose name matches a key (regular expression)."""


class QloraAdapter(LoraAdapter):
    """QLoRA (Dettmers et al. 2023): a preset of LoRA and a base that bitsandbytes holds in 4 or 8 bits."""

    method: Literal["qlora"]  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    """LoRA over a quantised base: `lora` with `model.quantization: nf4`, said in one word."""
    quantization: QuantFormat = "nf4"
    """Number format of the frozen base: of its linear layers and, in 4 bits, of fused experts without an update."""
    double_quantization: bool = True
    """Quantise the 4-bit scales too (saves about 0.4 bit per parameter)."""
    compute_dtype: ComputeDtype | Auto = "auto"
    """Dtype that 4-bit weights of linear layers are expanded to for a product; experts are expanded to the run's precision, as
    here with `auto`."""
    quant_storage: QuantStorage | Auto = "auto"
    """Dtype that holds the packed 4-bit numbers. ZeRO-3 shards the base only if it equals the compute dtype, which `auto`
    chooses."""


class Ia3Adapter(Section):
    """(IA)^3 (Liu et al. 2022): a frozen base, of which some activations are multiplied by trained factors."""

    method: Literal["ia3"]
    """Train factors for the outputs, or the inputs, of linear layers; the base stays frozen."""
    target_modules: TargetGroup | Literal["keys-values-mlp"] | Text | list[Text] = "keys-values-mlp"
    """Layers that get factors: as with `lora`, or `keys-values-mlp`, those of the paper: what gives keys and values (with the
    queries, where one matrix gives all three), and the MLP's way back. Fused experts get none."""
    feedforward_modules: Annotated[list[Text] | Auto, Field(examples=[["down_proj"]])] = "auto"
    """Names of the layers among `target_modules` whose inputs are multiplied and not their outputs. `auto` takes the
    MLP's ways back."""
    exclude_modules: list[Text] = []
    """Names of modules that `target_modules` would take but that get no factors."""
    modules_to_save: list[Text] = []
    """Modules outside of this that are trained in full and saved with the adapter, such as `embed_tokens` or `lm_head`."""


class LayerNormAdapter(Section):
    """Tuning of norms (Zhao et al. 2023): a frozen base, but for its norms, which are trained in full as copies."""

    method: Literal["layernorm"]
    """Train the norms in full; all else of the base stays frozen."""
    target_modules: Literal["all-norms"] | Text | list[Text] = "all-norms"
    """Norms that are trained: all of them, a list of module names, or a regular expression that must match a module's whole
    name."""
    exclude_modules: list[Text] = []
    """Names of norms that `target_modules` would take but that stay frozen."""
    modules_to_save: list[Text] = []
    """Other modules that are trained in full and saved with the norms, such as `embed_tokens` or `lm_head`."""


class LokrAdapter(Section):
    """LoKr (Yeh et al. 2023): a frozen base plus a trained update (alpha / rank) * A (x) B, a Kronecker product of two small
    matrices."""

    method: Literal["lokr"]
    """Train updates that are Kronecker products; the base stays frozen."""
    rank: PositiveInt = 16
    """Rank of the low-rank product that stands for the larger of both matrices; a matrix of at most twice this side is trained as
    it is."""
    alpha: PositiveFloat = 16.0
    """Scale of the update: it is multiplied by alpha / rank."""
    decompose_factor: PositiveInt | Auto = "auto"
    """Side of the smaller matrix, where it divides that of the layer, else the largest divisor below it; `auto` makes both
    matrices about as large. A small factor trains more parameters."""
    decompose_both: bool = False
    """Have the smaller matrix be a low-rank product of rank `rank` as well, where it is large enough."""
    rank_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a layer's outputs whose update is dropped in a pass."""
    target_modules: TargetGroup | Text | list[Text] = "all-linear"
    """Layers that get an update: as with `lora`. Fused experts get none."""
    exclude_modules: list[Text] = []
    """Names of modules that `target_modules` would take but that stay frozen."""
    modules_to_save: list[Text] = []
    """Modules outside of this that are trained in full and saved with the adapter, such as `embed_tokens` or `lm_head`."""


class LohaAdapter(Section):
    """LoHa (FedPara, Hyeon-Woo et al. 2022): a frozen base plus a trained update (alpha / rank) * (A B) * (C D), two low-rank
    matrices multiplied number by number, whose rank is up to the square of theirs."""

    method: Literal["loha"]
    """Train updates that are products, number by number, of two low-rank matrices; the base stays frozen."""
    rank: PositiveInt = 16
    """Rank of each of the two."""
    alpha: PositiveFloat = 16.0
    """Scale of the update: it is multiplied by alpha / rank."""
    rank_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a layer's outputs whose update is dropped in a pass."""
    target_modules: TargetGroup | Text | list[Text] = "all-linear"
    """Layers that get an update: as with `lora`. Fused experts get none."""
    exclude_modules: list[Text] = []
    """Names of modules that `target_modules` would take but that stay frozen."""
    modules_to_save: list[Text] = []
    """Modules outside of this that are trained in full and saved with the adapter, such as `embed_tokens` or `lm_head`."""


class VeraAdapter(Section):
    """VeRA (Kopiczko et al. 2024): a frozen base plus an update of two random matrices that all layers share and that stay as
    they are, between which each layer trains factors."""

    method: Literal["vera"]
    """Train factors of a low-rank update whose matrices are random and shared; the base stays frozen."""
    rank: PositiveInt = 256
    """Rank of the shared matrices."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the update."""
    d_initial: PositiveFloat = 0.1
    """Start of the factors between the two shared matrices; those behind them start at 0."""
    projection_prng_key: NonNegativeInt = 0
    """Seed of the shared matrices."""
    save_projection: bool = True
    """Save the shared matrices with the adapter. Without them the files are small, and are read with the matrices that PyTorch
    draws from the seed at that time."""
    target_modules: TargetGroup | Text | list[Text] = "all-linear"
    """Layers that get an update: as with `lora`. Fused experts get none."""
    exclude_modules: list[Text] = []
    """Names of modules that `target_modules` would take but that stay frozen."""
    modules_to_save: list[Text] = []
    """Modules outside of this that are trained in full and saved with the adapter, such as `embed_tokens` or `lm_head`."""


class OftAdapter(Section):
    """OFT (Qiu et al. 2023, 2025): a frozen base whose layers' inputs are rotated, block by block, by trained rotations."""

    method: Literal["oft"]
    """Train rotations of the inputs of linear layers; the base stays frozen."""
    block_size: Annotated[int, Field(ge=2, strict=True)] = 32
    """Inputs that are rotated together; it has to divide the inputs of each layer. Larger blocks train more parameters."""
    block_share: bool = False
    """Rotate all blocks of a layer alike."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a layer's blocks that are not rotated in a pass."""
    num_cayley_neumann_terms: Annotated[int, Field(ge=3, strict=True)] = 5
    """Terms of the series that makes a rotation of the trained numbers; more are closer to a rotation."""
    target_modules: TargetGroup | Text | list[Text] = "all-linear"
    """Layers that get a rotation: as with `lora`. Fused experts get none."""
    exclude_modules: list[Text] = []
    """Names of modules that `target_modules` would take but that stay frozen."""
    modules_to_save: list[Text] = []
    """Modules outside of this that are trained in full and saved with the adapter, such as `embed_tokens` or `lm_head`."""


class BoftAdapter(Section):
    """BOFT (Liu et al. 2024): a frozen base whose layers' inputs are rotated, block by block, and whose outputs are multiplied by
    trained factors. Several rotations, between which the blocks are mixed as a butterfly does, let far inputs meet. Each layer
    holds matrices as large as the square of its inputs: for small models."""

    method: Literal["boft"]
    """Train rotations of the inputs of linear layers, and factors of their outputs; the base stays frozen."""
    block_size: Annotated[int, Field(ge=2, strict=True)] = 4
    """Inputs that are rotated together; it has to divide the inputs of each layer. Larger blocks train more parameters."""
    num_butterfly_factors: PositiveInt = 1
    """Rotations of each layer, one after the other, which mix twice as many inputs each time. With more than 1 plain PEFT reads
    the adapter only where it can compile its CUDA extension; raytune reads and merges it everywhere."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the blocks of one of a layer's rotations that are not rotated in a pass."""
    target_modules: TargetGroup | Text | list[Text] = "all-linear"
    """Layers that get rotations: as with `lora`. Fused experts get none."""
    exclude_modules: list[Text] = []
    """Names of modules that `target_modules` would take but that stay frozen."""
    modules_to_save: list[Text] = []
    """Modules outside of this that are trained in full and saved with the adapter, such as `embed_tokens` or `lm_head`."""


class BottleneckAdapter(Section):
    """Bottleneck adapters (Houlsby et al. 2019): a frozen base, behind whose attention and MLPs small networks are trained that
    add something to what these give. They start by adding nothing. PEFT has no such method: what is saved is read by raytune."""

    method: Literal["bottleneck"]
    """Train small networks behind attention and MLPs; the base stays frozen."""
    reduction: PositiveInt = 16
    """A network is as wide inside as what it stands behind, divided by this."""
    width: Annotated[PositiveInt | None, Field(examples=[64])] = None
    """Width inside a network, in place of `reduction`."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """What stands between a network's two layers."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on what a network has inside."""
    target_modules: Literal["attention-mlp", "attention", "mlp"] | Text | list[Text] = "attention-mlp"
    """Where they stand: behind attention and the MLP of each layer (Houlsby et al.), behind the MLP (`mlp`, Pfeiffer et al. 2021)
    or `attention` only; or behind linear layers by their names, as with `lora`. Behind a mixture of experts stands one."""
    exclude_modules: list[Text] = []
    """Names of modules that `target_modules` would take but behind which nothing stands."""
    modules_to_save: list[Text] = []
    """Modules of the base that are trained in full and saved with the networks, such as `embed_tokens` or `lm_head`."""


class AdaLoraAdapter(Section):
    """AdaLoRA (Zhang et al. 2023): low-rank updates B E A with a factor for each rank, of which those that matter least are taken
    away while training goes on, wherever they are, until `rank` are left per layer on average."""

    method: Literal["adalora"]
    """Train low-rank updates whose ranks are shared out among the layers by importance; the base stays frozen."""
    rank: PositiveInt = 8
    """Rank of an update in the end, on average over the layers."""
    initial_rank: Annotated[PositiveInt | Auto, Field(examples=[12])] = "auto"
    """Rank of each update in the beginning; `auto`: one and a half times `rank`, as in the paper."""
    alpha: PositiveFloat = 16.0
    """Scale of the update: it is multiplied by alpha / `initial_rank`, whatever rank is left."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the update."""
    tinit_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps, at the beginning, in which no rank is taken away. The paper takes about a tenth."""
    tfinal_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the steps, at the end, in which the ranks stay as they are. The paper takes about half."""
    delta_t: PositiveInt = 10
    """Steps from one choice of ranks to the next, between `tinit_fraction` and `tfinal_fraction`."""
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Share of the running average of importance (weight times gradient) that stays from step to step."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Share of the running average of how much importance wavers that stays from step to step."""
    orthogonal_weight: NonNegativeFloat = 0.5
    """What is added to the loss is this times the mean, over all A and B, of how far their ranks are from orthonormal."""
    target_modules: TargetGroup | Text | list[Text] = "all-linear"
    """Layers that get an update: as with `lora`. Fused experts get none."""
    exclude_modules: list[Text] = []
    """Names of modules that `target_modules` would take but that stay frozen."""
    modules_to_save: list[Text] = []
    """Modules outside of this that are trained in full and saved with the adapter, such as `embed_tokens` or `lm_head`."""


class TrainableTokensAdapter(Section):
    """Trainable tokens: a frozen base, but for the rows of some tokens in embedding and head."""

    method: Literal["trainable_tokens"]
    """Train rows of embedding and head; all else stays as it is."""
    trainable_tokens: list[Text] | Auto = "auto"
    """Tokens whose rows are trained, as the tokenizer's vocabulary writes them. `model.new_tokens` are always among them; `auto`
    takes these alone."""


class PromptTuningAdapter(Section):
    """Prompt tuning (Lester et al. 2021): a frozen base, and trained embeddings of virtual tokens in front of each document."""

    method: Literal["prompt_tuning"]
    """Train embeddings of virtual tokens; the base stays frozen."""
    num_virtual_tokens: PositiveInt = 20
    """Virtual tokens in front of each document. They take positions of the model, and lengthen rows."""
    prompt_init: Literal["vocabulary", "random"] = "vocabulary"
    """Start of the virtual tokens: embeddings of tokens drawn from the vocabulary, or numbers of a normal distribution."""
    prompt_init_text: Annotated[Text | None, Field(examples=["Reply in JSON."])] = None
    """A text to start from: its tokens' embeddings, repeated or cut to as many as there are virtual tokens."""


class PrefixTuningAdapter(Section):
    """Prefix tuning (Li and Liang 2021): a frozen base, and trained keys and values of virtual tokens in front of each document,
    in each layer."""

    method: Literal["prefix_tuning"]
    """Train keys and values of virtual tokens in each layer; the base stays frozen."""
    num_virtual_tokens: PositiveInt = 20
    """Virtual tokens in front of each document. They take positions of the model."""
    prefix_init: Literal["zero", "random"] = "zero"
    """Start of keys and values: 0, or numbers of a normal distribution."""
    projection: bool = False
    """Have keys and values come from smaller embeddings, by two layers with tanh between them, which are trained as well and not
    saved."""
    encoder_hidden_size: Annotated[PositiveInt | Auto, Field(examples=[128])] = "auto"
    """Width between the two layers of `projection`; `auto` is that of a layer's keys."""


class PTuningAdapter(Section):
    """P-tuning (Liu et al. 2021): as prompt tuning, but the embeddings come from others, by an MLP of three layers."""

    method: Literal["p_tuning"]
    """Train embeddings of virtual tokens and an MLP that they pass through; the base stays frozen."""
    num_virtual_tokens: PositiveInt = 20
    """Virtual tokens in front of each document. They take positions of the model, and lengthen rows."""
    encoder_hidden_size: PositiveInt | Auto = "auto"
    """Width inside the MLP, which is not saved; `auto` is the model's."""


Adapter = Annotated[
    FullAdapter
    | LoraAdapter
    | QloraAdapter
    | Ia3Adapter
    | LayerNormAdapter
    | LokrAdapter
    | LohaAdapter
    | VeraAdapter
    | OftAdapter
    | BoftAdapter
    | BottleneckAdapter
    | AdaLoraAdapter
    | TrainableTokensAdapter
    | PromptTuningAdapter
    | PrefixTuningAdapter
    | PTuningAdapter,
    Field(discriminator="method"),
]


def num_virtual_tokens(adapter: Adapter) -> int:
    """Virtual tokens that a method lays in front of each document; 0: none."""
    return getattr(adapter, "num_virtual_tokens", 0)


def own_quantization(adapter: Adapter) -> Quantization | None:
    """How a preset of base and adapter (`qlora`) has the base held; None: the method leaves it to the `model` section."""
    if not isinstance(adapter, QloraAdapter):
        return None
    return Quantization(
        format=adapter.quantization,
        double_quantization=adapter.double_quantization,
        compute_dtype=adapter.compute_dtype,
        quant_storage=adapter.quant_storage,
    )


def without_preset(adapter: Adapter) -> Adapter:
    """What is trained, without what a preset says of the base beside it."""
    if not isinstance(adapter, QloraAdapter):
        return adapter
    values = {name: getattr(adapter, name) for name in LoraAdapter.model_fields}
    written = adapter.model_fields_set - QUANTIZATION_KEYS
    return LoraAdapter.model_construct(_fields_set=written, **(values | {"method": "lora"}))


def preset_of(adapter: Adapter) -> Adapter | None:
    """The preset that adds a base in 4 bits, in place of a section that has none; None: there is no preset of its method."""
    if isinstance(adapter, LoraAdapter):
        return QloraAdapter(**adapter.model_dump(exclude={"method"}), method="qlora")
    return QloraAdapter(method="qlora") if isinstance(adapter, FullAdapter) else None


QUANTIZATION_KEYS = {*QloraAdapter.model_fields} - {*LoraAdapter.model_fields}
"""Keys of an adapter section that speak of the base."""
WITHOUT_NOISE = ("prompt_tuning", "p_tuning", "trainable_tokens")
"""Methods that train embeddings of their own, or rows of them, for which the noise of NEFTune has no rule."""
WITHOUT_DECAY = ("ia3", "trainable_tokens", "prompt_tuning", "prefix_tuning", "p_tuning")
"""Methods whose numbers are no update: a decay would draw them to 0, which is not the base."""
