"""A model that is asked questions: which files it is made of, as plain transformers and PEFT load them."""

from raytune.config.sections.adapter import Adapter, FullAdapter
from raytune.config.sections.training import Precision
from raytune.plan.run_plan import ModelPlan, RopePlan
from raytune.plan.value import Plan

_WHOLE = FullAdapter(method="full")


class AskedModel(Plan):
    name: str
    """In results."""
    model: ModelPlan
    """What transformers loads: a base, or a whole model that was trained."""
    held_for: Adapter = _WHOLE
    """The method that a quantised base is loaded for: what it changes of fused experts is not packed."""
    adapter: str | None = None
    """Folder or URL of what PEFT lays over it; None: nothing."""
    stops: str | None = None
    """Folder or URL whose settings of generation say where an answer ends: a base is asked in the template of the tuned model,
    and is not to lose by writing on behind an answer. None: the model's own."""
    tokenizer: str | None = None
    """Folder, URL or hub id of the tokenizer that decodes answers; None: the model's own."""
    kept_tokens: tuple[str, ...] = ()
    """Special tokens that stay in its answers."""
    can_pad: bool = True
    """Whether prompts of different lengths may share a batch."""

    def named(self, name: str) -> "AskedModel":
        return self.model_copy(update={"name": name})


def files_alone(model: ModelPlan, adapter: Adapter) -> tuple[ModelPlan, Adapter]:
    """A model of a run without what only training asks of it, so that equal files are equal here; and what it is held for."""
    is_packed = model.quantization is not None
    alone = plain_model(
        model.path,
        model.compute_dtype,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        rope=model.rope,
    ).model_copy(
        update={
            "dtype": model.dtype if is_packed else model.compute_dtype,
            "quantization": model.quantization,
            "new_tokens": model.new_tokens,
            "num_embeddings": model.num_embeddings,
        }
    )
    return alone, adapter if is_packed else _WHOLE


def plain_model(
    path: str, dtype: Precision, *, revision: str | None = None, trust_remote_code: bool = False, rope: RopePlan | None = None
) -> ModelPlan:
    """A model as transformers loads it of its files.

    Args:
        path: as `ModelPlan.path`.
        dtype: that it is loaded and computes in.
    """
    return ModelPlan(
        path=path,
        revision=revision,
        trust_remote_code=trust_remote_code,
        attention="sdpa",
        dtype=dtype,
        compute_dtype=dtype,
        gradient_checkpointing=False,
        compile=False,
        liger=False,
        neftune_noise_alpha=0.0,
        rope=rope,
    )


def on_device(one: AskedModel, device: str) -> AskedModel:
    """The model as a kind of device computes it: CPUs compute some products in fp16 not at all, others slowly."""
    model = one.model
    if device != "cpu" or model.compute_dtype != "fp16":
        return one
    held = model.quantization and model.quantization.model_copy(update={"compute_dtype": "fp32"})
    return one.model_copy(
        update={"model": model.model_copy(update={"dtype": "fp32", "compute_dtype": "fp32", "quantization": held})}
    )
