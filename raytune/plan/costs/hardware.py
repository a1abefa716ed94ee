"""The hardware catalogue: GPUs and the instances that clouds rent, as `configs/hardware/*.yaml` lists them.

Each entry says where its figures come from and of which date they are. A GPU or a price is an entry in a file, nothing here.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from raytune.config.problems import ConfigError, Place
from raytune.config.sections.section import NonNegativeFloat, PositiveFloat, PositiveInt, Size, Text
from raytune.config.yaml_nodes import read_nodes
from raytune.errors import UserError

HARDWARE = Path(__file__).parents[3] / "configs" / "hardware"
PACKAGED_HARDWARE = Path(__file__).parents[1] / "hardware_files"
"""Where an installed wheel has them (pyproject.toml, force-include)."""

Cloud = Literal["aws", "gcp", "azure", "on-prem"]
Fabric = Literal["efa", "infiniband", "tcpx", "tcpxo", "tcp"]
Date = Annotated[str, Field(pattern=r"^20\d\d-\d\d-\d\d$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of GPU."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    name: Text
    memory_bytes: Size
    """As CUDA reports it, a little less than the data sheet's number."""
    memory_bytes_per_s: PositiveFloat
    bf16_flops: PositiveFloat
    """Dense products in 16 bits, by the data sheet; in fp16 where it has no bf16."""
    practical_share: Annotated[float, Field(gt=0, le=1)]
    """Of `bf16_flops`, what large matrix products reach."""
    host_bytes_per_s: PositiveFloat
    """To and from the host's memory, one direction (PCIe)."""
    supports_bf16: bool
    supports_flash: bool
    """FlashAttention 2, which needs compute capability 8.0."""
    source: Text
    date: Date


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One kind of node."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    name: Text
    cloud: Cloud
    gpu: Text
    num_gpus: PositiveInt
    num_cpus: PositiveInt
    """As the operating system counts them."""
    host_memory_bytes: Size
    nvme_bytes: Size
    """Local disks that come with it; 0: none."""
    intra_bytes_per_s: PositiveFloat
    """Between two of its GPUs, one direction per GPU (NVLink or PCIe)."""
    inter_bytes_per_s: PositiveFloat
    """To other nodes, one direction, of the whole node."""
    fabric: Fabric
    num_interfaces: PositiveInt
    tcp_bytes_per_s: PositiveFloat | None = None
    """As `inter_bytes_per_s`, where its nodes talk over TCP because their fast network is not set up; None: not known."""
    usd_per_hour: NonNegativeFloat
    """List price on demand; 0: not rented by the hour."""
    spot_usd_per_hour: PositiveFloat | None
    """None: not known here."""
    regions: tuple[Text, ...]
    """Some that have it, the one of the price first."""
    source: Text
    date: Date


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All that is known, by name."""

    gpus: dict[str, Gpu]
    instances: dict[str, Instance]

    def gpu(self, name: str) -> Gpu:
        """Raises: UserError, if it is not known; with the nearest names."""
        return _found(self.gpus, name, "GPU", "configs/hardware/gpus.yaml")

    def instance(self, name: str) -> Instance:
        """Raises: UserError, if it is not known; with the nearest names."""
        return _found(self.instances, name, "instance type", "configs/hardware/instances.yaml", keys=("cluster.instance",))

    def gpu_of(self, instance: Instance) -> Gpu:
        """The GPUs of a node."""
        return self.gpu(instance.gpu)


@cache
def load_catalogue(folder: Path | None = None) -> Catalogue:
    """Read `gpus.yaml` and `instances.yaml`.

    Args:
        folder: where they are; default: raytune's own.

    Raises:
        ConfigError: if a file is not YAML.
        UserError: if an entry lacks something, has too much, or names a GPU that is not listed; the message names it.
    """
    folder = folder or (HARDWARE if HARDWARE.is_dir() else PACKAGED_HARDWARE)
    gpus = _by_name(_read_entries(folder / "gpus.yaml", Gpu), folder / "gpus.yaml")
    instances = _by_name(_read_entries(folder / "instances.yaml", Instance), folder / "instances.yaml")
    for instance in instances.values():
        _found(gpus, instance.gpu, f"{instance.name} has a GPU of kind", str(folder / "gpus.yaml"))
    return Catalogue(gpus, instances)


Entry = TypeVar("Entry", Gpu, Instance)


def _read_entries(path: Path, kind: type[Entry]) -> list[Entry]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"The hardware catalogue {path} cannot be read: {error}.") from error
    node, problems = read_nodes(text, Place(str(path), 1, 1))
    if problems:
        raise ConfigError(problems)
    lines: Any = node.plain if node else None
    if not isinstance(lines, list):
        raise UserError(f"The hardware catalogue {path} must be a list of entries.")
    reader = TypeAdapter(kind)
    return [_entry(line, reader, path) for line in lines]


def _entry(line: Any, reader: TypeAdapter[Entry], path: Path) -> Entry:
    try:
        return reader.validate_python(line)
    except ValidationError as error:
        name = line.get("name") if isinstance(line, dict) else line
        first = error.errors()[0]
        raise UserError(f"{path}: entry {name!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error


def _by_name(entries: Iterable[Entry], path: Path) -> dict[str, Entry]:
    named: dict[str, Entry] = {}
    for entry in entries:
        if entry.name in named:
            raise UserError(f"{path}: {entry.name!r} is listed twice.")
        named[entry.name] = entry
    return named


def _found(known: dict[str, Entry], name: str, what: str, where: str, keys: tuple[str, ...] = ()) -> Entry:
    if name in known:
        return known[name]
    by_lower = {one.lower(): one for one in known}
    near = [by_lower[one] for one in get_close_matches(name.lower(), by_lower, 3, cutoff=0.4)]
    hint = f"Did you mean {' or '.join(near)}?" if near else f"It knows {', '.join(known)}."
    raise UserError(f"{what} {name!r} is not in the hardware catalogue ({where}). {hint}", keys=keys)
