"""A model that is asked questions: which files it is made of, as plain transformers and PEFT load them."""

from raytune.config.adapter import Adapter, FullAdapter
from raytune.plan.run_plan import ModelPlan
from raytune.plan.value import Plan


class AskedModel(Plan):
    name: str
    """In results."""
    model: ModelPlan
    """What transformers loads: a base, or a whole model that was trained."""
    held_for: Adapter = FullAdapter(method="full")
    """The method that a quantised base is loaded for: what it changes of fused experts is not packed."""
    adapter: str | None = None
    """Folder or URL of what PEFT lays over it; None: nothing."""
    stops: str | None = None
    """Folder or URL whose settings of generation say where an answer ends: a base is asked in the template of the tuned model,
    and is not to lose by writing on behind an answer. None: the model's own."""
    tokenizer: str | None = None
    """Folder or URL of the tokenizer that decodes answers; None: the model's own."""
    kept_tokens: tuple[str, ...] = ()
    """Special tokens that stay in its answers."""
    can_pad: bool = True
    """Whether prompts of different lengths may share a batch."""
