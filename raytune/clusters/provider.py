"""What a cluster is to be, and the commented files that describe it to Ray, KubeRay or a cloud. Pure: values in, text out.

The templates are data, in `cluster/`: one per cloud and GPU family. This file says what each needs and refuses what is missing.
"""

import glob
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from raytune.config.load import as_one_run, dump_yaml
from raytune.config.sections.cluster import ClusterSection
from raytune.config.sections.provider import ProviderSection
from raytune.config.sections.row_sources import named_code, named_models, named_tasks, row_sources
from raytune.config.sections.run import RunConfig
from raytune.errors import UserError
from raytune.plan.costs.hardware import Catalogue, Cloud, Instance
from raytune.storage import is_local
from raytune.units import GIB, format_rate

Target = Literal["ray-up", "network", "kuberay", "kuberay-cluster"]

TEMPLATES = Path(__file__).resolve().parents[2] / "cluster"
PACKAGED_TEMPLATES = Path(__file__).resolve().parent / "templates"
"""Where an installed wheel has them (pyproject.toml, force-include)."""

FAMILIES = {
    "aws/p4": ("p4d", "p4de"),
    "aws/p5": ("p5", "p5e", "p5en"),
    "aws/g": ("g5", "g6", "g6e"),
    "gcp/a2": ("a2-highgpu", "a2-ultragpu"),
    "gcp/a3": ("a3-highgpu", "a3-megagpu"),
    "azure/nd-a100": ("Standard_ND96asr_v4", "Standard_ND96amsr_A100_v4"),
    "azure/nd-h100": ("Standard_ND96isr_H100_v5",),
}
"""Template of a `ray up` file -> the instance families that it is for."""
NETWORKS = {"aws": "aws/network.yaml", "gcp": "gcp/network.sh", "azure": "azure/network.json"}
KUBERAY = {"kuberay": "kuberay/rayjob.yaml", "kuberay-cluster": "kuberay/raycluster.yaml"}
HEADS = {"aws": "m6i.2xlarge", "gcp": "n2-standard-8", "azure": "Standard_D8s_v5"}

NEEDED: dict[str, tuple[str, ...]] = {
    "ray-up aws": ("zone", "subnet", "security_group", "machine_image", "key_name"),
    "ray-up gcp": ("account", "zone", "machine_image", "ssh_public_key"),
    "ray-up azure": ("account", "resource_group", "machine_image"),
    "ray-up hosts": (),
    "network aws": ("client_cidr", "network"),
    "network gcp": ("client_cidr", "account"),
    "network azure": ("client_cidr", "account", "resource_group"),
    "kuberay": ("container",),
}
"""Keys of `provider` without which a file cannot be written."""

ONLY_ON: dict[str, tuple[Cloud, ...]] = {
    "account": ("gcp", "azure"),
    "resource_group": ("azure",),
    "network": ("aws",),
    "subnet": ("aws",),
    "security_group": ("aws",),
    "key_name": ("aws",),
    "reservation": ("aws", "gcp"),
    "capacity_block": ("aws",),
    "ssh_public_key": ("gcp",),
    "nccl_profile": ("gcp",),
}
"""Keys of `provider` that the files of some clouds alone name."""
RESERVED = ("reservation", "capacity_block")
NAMES_OF_CLOUDS = {"aws": "AWS", "gcp": "GCP", "azure": "Azure"}

LONGEST_NAME = 37
"""Of a cluster's name: GCP allows 63 letters to a rule of a network (raytune-NAME-gpu-7-among-nodes), KubeRay 47 to a RayJob."""
PARTITIONS = {"us-gov-": "aws-us-gov", "cn-": "aws-cn"}
"""How regions of AWS begin whose resources have other names (ARNs) than `arn:aws:`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """A cluster in numbers and names; all that the templates read."""

    name: str
    """Letters, digits and dashes, starting with a letter."""
    instance: Instance
    num_nodes: int
    """Nodes with GPUs; the head comes on top, except where it is one of `user.hosts` that trains too."""
    spot: bool
    user: ProviderSection
    storage: str
    """Where run folders go: a folder or a URL."""
    run_yaml: str
    """The run, as a config file."""
    ray_version: str

    @property
    def head_trains(self) -> bool:
        """Whether the head is one of the GPU nodes."""
        return len(self.user.hosts) == self.num_nodes

    @property
    def shm_gib(self) -> int:
        """Shared memory of a GPU node: Ray's object store and NCCL's buffers; a quarter of all memory."""
        return max(8, self.instance.host_memory_bytes // 4 // GIB)

    @property
    def region(self) -> str:
        return self.user.region or (self.instance.regions[0] if self.instance.regions else "")

    @property
    def head_instance(self) -> str:
        return self.user.head_instance or HEADS[self.instance.cloud]

    @property
    def partition(self) -> str:
        """Of AWS, which the names of its resources begin with."""
        return next((name for start, name in PARTITIONS.items() if self.region.startswith(start)), "aws")

    @property
    def storage_folder(self) -> str | None:
        """The folder that run folders go to, if they go to one."""
        return os.path.normpath(self.storage.removeprefix("file://")) if is_local(self.storage) else None

    @property
    def bucket(self) -> str | None:
        """The bucket that run folders go to, if they go to one."""
        scheme, separator, rest = self.storage.partition("://")
        return rest.partition("/")[0] if separator and scheme in ("s3", "gs", "gcs") else None

    @property
    def unique_id(self) -> str:
        """Four characters that tell the Azure resources of this cluster from others."""
        return sha256(f"{self.user.resource_group}/{self.name}".encode()).hexdigest()[:4]


def cluster_spec(config: RunConfig, catalogue: Catalogue, target: Target) -> ClusterSpec:
    """The cluster that a run config describes, if it says all that a file of this kind needs.

    Raises:
        UserError: with every key that is missing or cannot be meant.
    """
    section, user = config.cluster, config.provider
    if section.instance is None:
        raise UserError(
            "cluster.instance is not set: a cluster file needs the type of its GPU nodes, for example "
            "cluster.instance=p5.48xlarge. configs/hardware/instances.yaml lists those that raytune knows."
        )
    instance = catalogue.instance(section.instance)
    spec = ClusterSpec(
        name=cluster_name(config.name),
        instance=instance,
        num_nodes=section.nodes,
        spot=section.spot,
        user=user,
        storage=config.storage,
        run_yaml=dump_yaml(config.model_copy(update={"provider": ProviderSection()})),
        ray_version=version("ray"),
    )
    if target == "kuberay":
        as_one_run(config)  # which the RayJob is to train
    problems = [f"{key}: needed, not set" for key in _missing(spec, target)] + _contradictions(spec, target)
    problems += _asked_otherwise(section, spec, target)
    if target == "kuberay":
        problems += _not_in_pods(config)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise UserError(
            f"No {target} file can be written for {instance.name} ({instance.cloud}):{lines}\nSee `explain provider`."
        )
    return spec


def cluster_name(run_name: str) -> str:
    """A run's name as clouds and Kubernetes allow names: letters, digits and dashes, starting with a letter."""
    letters = "".join(letter if letter.isalnum() else "-" for letter in run_name)
    letters = letters if letters[0].isalpha() else f"run-{letters}"
    return shortened(letters, LONGEST_NAME).strip("-")


def shortened(name: str, longest: int) -> str:
    """A name of so many letters at most; two that begin alike stay two."""
    return name if len(name) <= longest else f"{name[: longest - 5].rstrip('-')}-{sha256(name.encode()).hexdigest()[:4]}"


def render(spec: ClusterSpec, target: Target, facts: dict[str, Any]) -> str:
    """Fill a template.

    Args:
        facts: what the target's own module works out, beside `spec`.
    """
    text = _environment().get_template(f"{template_of(spec, target)}.j2").render(spec=spec, user=spec.user, **facts)
    return text if text.endswith("\n") else text + "\n"


@cache
def _environment() -> Any:
    """Jinja's, which keeps each template as it compiled it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = TEMPLATES if TEMPLATES.is_dir() else PACKAGED_TEMPLATES
    # Not HTML: values are quoted for YAML or the shell where they stand, and checked by the config's patterns before.
    environment = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    filters: dict[str, Callable[..., str]] = {"q": json.dumps, "sh": shlex.quote, "rate": format_rate}
    environment.filters.update(filters)
    return environment


def template_of(spec: ClusterSpec, target: Target) -> str:
    """The template's path below `cluster/`, without its ending.

    Raises:
        UserError: if there is none for this kind of machine.
    """
    if target in KUBERAY:
        return KUBERAY[target]
    place = place_of(spec)
    if target == "network":
        if place in NETWORKS:
            return NETWORKS[place]
        raise UserError("Hosts that run already have their network; there is nothing to make (--target network is for clouds).")
    if place == "hosts":
        return "on-prem/hosts.yaml"
    name = spec.instance.name
    family = {name, name.partition(".")[0], name.rpartition("-")[0]}
    template = next((template for template, families in FAMILIES.items() if family.intersection(families)), None)
    if template is None:
        known = ", ".join(family for families in FAMILIES.values() for family in families)
        raise UserError(
            f"There is no `ray up` template for {name}, only for {known}. Start other machines yourself and list their addresses "
            f"in provider.hosts, or use --target kuberay."
        )
    return f"{template}.yaml"


def place_of(spec: ClusterSpec) -> Cloud | Literal["hosts"]:
    """Who starts the machines: a cloud, or nobody because they run already."""
    return "hosts" if spec.user.hosts or spec.instance.cloud == "on-prem" else spec.instance.cloud


def _missing(spec: ClusterSpec, target: Target) -> list[str]:
    kind = "kuberay" if target in KUBERAY else f"{target} {place_of(spec)}"
    missing = [f"provider.{key}" for key in NEEDED.get(kind, ()) if getattr(spec.user, key) is None]
    if target == "ray-up" and not (spec.user.container or spec.user.environment):
        missing.append("provider.container or provider.environment")
    if target == "ray-up" and place_of(spec) == "hosts" and not spec.user.hosts:
        missing.append("provider.hosts")
    if target in KUBERAY and spec.storage_folder and spec.user.kubernetes.storage_claim is None:
        missing.append("provider.kubernetes.storage_claim (or a URL as storage)")
    return missing


def _not_in_pods(config: RunConfig) -> list[str]:
    """What the run reads from this machine's working directory, which no pod has. Other names are a hub's."""
    template = config.data.template
    paths = [
        *named_models(config).items(),
        *named_tasks(config).items(),
        *([("data.template", template)] if Path(template).is_file() else []),
    ]
    paths += [(key, source.path) for key, sources in row_sources(config).items() for source in sources]
    return [
        f"{key}: {path} is relative to this folder; give a path that the pods have, or a URL"
        for key, path in paths
        if is_local(path) and not path.startswith("/") and (path.startswith(".") or glob.has_magic(path) or Path(path).exists())
    ] + [
        f"{key}: {file} is relative to this folder; give its path in the container, or name a module that is installed there"
        for key, file in named_code(config)
        if not file.startswith(("/", "~"))
    ]


def _asked_otherwise(section: ClusterSection, spec: ClusterSpec, target: Target) -> list[str]:
    """What the run asks of its cluster that this one is not."""
    num_gpus, problems = spec.num_nodes * spec.instance.num_gpus, []
    if section.workers != "auto" and section.gpus_per_worker != 0 and section.workers > num_gpus:
        problems.append(
            f"cluster.workers: {section.workers}, but {spec.num_nodes} x {spec.instance.name} have {num_gpus} GPUs; set it to "
            f"{num_gpus} or less, or cluster.nodes to more"
        )
    if target == "kuberay" and section.address not in (None, "auto"):
        problems.append(
            f"cluster.address: {section.address} is another cluster than the RayJob starts, and the run would join that; drop it"
        )
    return problems


def _contradictions(spec: ClusterSpec, target: Target) -> list[str]:
    user, problems = spec.user, []
    shared = spec.storage_folder is None or f"{spec.storage_folder}/".startswith(f"{user.mount_point.rstrip('/')}/")
    if target != "network" and not shared:
        problems.append(
            f"storage: {spec.storage} is on one machine; use a folder below {user.mount_point} (provider.mount_point) or a URL"
        )
    if target == "ray-up" and user.hosts and len(user.hosts) not in (spec.num_nodes, spec.num_nodes + 1):
        problems.append(
            f"provider.hosts: {len(user.hosts)} addresses for cluster.nodes={spec.num_nodes}; give {spec.num_nodes} (the head "
            f"trains too) or {spec.num_nodes + 1}"
        )
    if len(set(user.hosts)) < len(user.hosts):
        problems.append("provider.hosts: an address is given twice")
    if target == "ray-up" and place_of(spec) in ("aws", "gcp") and user.zone and not user.zone.startswith(spec.region):
        problems.append(f"provider.zone: {user.zone} does not lie in region {spec.region}")
    if user.reservation and spec.spot:
        problems.append("provider.reservation: reserved nodes are not spot nodes; drop it or set cluster.spot=false")
    if target not in KUBERAY:
        problems += [
            f"provider.{key}: only {' and '.join(NAMES_OF_CLOUDS[cloud] for cloud in clouds)} files name one; drop it"
            for key, clouds in ONLY_ON.items()
            # Machines of a cloud that run already keep that cloud's keys, but nobody reserves them.
            if getattr(user, key) and (place_of(spec) if key in RESERVED else spec.instance.cloud) not in clouds
        ]
    if user.capacity_block and not user.reservation:
        problems.append("provider.capacity_block: needs provider.reservation, the id of the block")
    return problems
