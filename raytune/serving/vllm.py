"""`raytune serve --engine vllm --dry-run`: the file by which Ray Serve starts vLLM for the models that are named."""

from raytune.config.yaml_nodes import write_yaml
from raytune.errors import UserError
from raytune.launch.asking.models_to_ask import Named, ToAsk, models_to_ask
from raytune.plan.costs.hardware import load_catalogue
from raytune.plan.methods.lora import lora_rank
from raytune.plan.model.base_model import read_model_shape
from raytune.plan.saved.vllm import vllm_file
from raytune.serving.subjects import served_subjects


def vllm_yaml(named: Named, *, instance: str | None, replicas: int, max_batch: int, max_waiting: int) -> str:
    """The file for `serve run`.

    Args:
        instance: type of the nodes, by the hardware catalogue; None: that of the run.

    Raises:
        UserError: if nobody says what the nodes are, or vLLM cannot serve the models.
    """
    to_ask = models_to_ask(named)
    subjects = served_subjects(to_ask)
    catalogue = load_catalogue()
    node = catalogue.instance(_instance(to_ask, instance))
    base = subjects[0].asked.model
    text = vllm_file(
        [one.asked for one in subjects],
        read_model_shape(base.path, base.revision, trust_remote_code=base.trust_remote_code),
        _rank(to_ask) if len(subjects) > 1 else None,
        node,
        catalogue.gpu_of(node),
        replicas=replicas,
        max_batch=max_batch,
        max_waiting=max_waiting,
    )
    return write_yaml(text)


def _instance(to_ask: ToAsk, named: str | None) -> str:
    found = named or (to_ask.run.config.cluster.instance if to_ask.run else None)
    if found is None:
        raise UserError("vLLM is planned for GPUs of a kind: name the type of the nodes with --instance, as cluster.instance.")
    return found


def _rank(to_ask: ToAsk) -> int | None:
    """Of a run's adapter; of those in local folders, which Ray does not load, nothing is asked."""
    if to_ask.run is None:
        return None
    adapter = to_ask.run.plan.adapter
    rank = lora_rank(adapter)
    if rank is None:
        raise UserError(
            f"vLLM reads no adapters of {adapter.method}. Merge it into its base (raytune merge), and serve the result."
        )
    return rank
