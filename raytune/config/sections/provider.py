"""`provider`: what only the user knows about the machines that `cluster render` describes. Training itself reads none of it."""

from ipaddress import IPv4Address, IPv4Network
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from raytune.config.sections.section import PositiveInt, Section, Text

WIDEST_CIDR = 8
"""Shortest prefix that a range of client addresses may have: a wider one is the world, not a client."""


def _client_range(text: str) -> str:
    network = IPv4Network(text)
    if network.prefixlen < WIDEST_CIDR:
        raise ValueError(f"opens port 22 to {network.num_addresses:,} addresses; give your own range, for example 203.0.113.7/32")
    return text


def _address(text: str) -> str:
    return str(IPv4Address(text))


Identifier = Annotated[Text, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$", title="an identifier")]
"""A name that clouds and shells take as it is: no spaces, no quotes."""
Path = Annotated[
    Text, Field(pattern=r"^[~/][A-Za-z0-9._/+-]*$", title="an absolute path without spaces", examples=["/opt/raytune"])
]
MountPoint = Annotated[
    Text,
    Field(
        pattern=r"^/[A-Za-z0-9._+-][A-Za-z0-9._/+-]*$",
        title="an absolute path of a folder, without ~ and spaces",
        examples=["/shared"],
    ),
]
"""The same for every user, and not the root."""
Login = Annotated[Text, Field(pattern=r"^[a-z_][a-z0-9_-]*$", title="a login name", examples=["ubuntu"])]
KubernetesName = Annotated[
    Text, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", title="a Kubernetes name", examples=["default"])
]
Image = Annotated[
    Text,
    Field(
        pattern=r"^[a-z0-9][A-Za-z0-9._:/-]*@sha256:[0-9a-f]{64}$",
        title="an image with its digest",
        examples=["registry.example.com/raytune@sha256:" + 64 * "0"],
    ),
]
ClientRange = Annotated[
    Text, AfterValidator(_client_range), Field(title="a range of addresses such as 203.0.113.7/32", examples=["203.0.113.7/32"])
]
Address = Annotated[Text, AfterValidator(_address), Field(title="an IPv4 address", examples=["10.0.0.1"])]
SshPublicKey = Annotated[
    Text,
    Field(
        pattern=r"^(ssh-(ed25519|rsa)|ecdsa-[a-z0-9-]+) [A-Za-z0-9+/=]+( [\w@.-]+)?$",
        title="a public ssh key",
        examples=["ssh-ed25519 AAAA me"],
    ),
]


class KubernetesSection(Section):
    namespace: KubernetesName = "default"
    """Where the manifests go."""
    queue: KubernetesName | None = None
    """Kueue's LocalQueue: all pods of a job start together or none does. Default: no queue."""
    storage_claim: KubernetesName | None = None
    """PersistentVolumeClaim (ReadWriteMany) that every pod mounts at `provider.mount_point`."""
    token_secret: KubernetesName = "raytune-token"
    """Secret with Ray's authentication token under the key auth_token."""
    hub_secret: KubernetesName | None = None
    """Secret with a Hugging Face token under the key token; mounted as a file. Default: none."""
    user_id: PositiveInt = 1000
    """User and group that the pods run as."""
    rdma_resource: Identifier | None = None
    """Resource of an InfiniBand device plugin, for example rdma/ib: a worker asks for one per interface. EFA needs none."""


class ProviderSection(Section):
    client_cidr: ClientRange | None = None
    """Addresses from which port 22 can be reached; no other port is opened."""
    region: Identifier | None = None
    """Region or Azure location. Default: the first that the hardware catalogue lists for the instance."""
    zone: Identifier | None = None
    """Availability zone. All nodes lie in one, else their fast network does not connect them."""
    account: Identifier | None = None
    """GCP: project id. Azure: subscription id."""
    resource_group: Identifier | None = None
    """Azure: resource group of the cluster."""
    network: Identifier | None = None
    """AWS: id of the VPC for the security group."""
    subnet: Identifier | None = None
    """AWS: id of the subnet; private, with a way out (NAT gateway or endpoints)."""
    security_group: Identifier | None = None
    """AWS: id of the security group that `cluster render --target network` makes. Ray's own would let everybody reach port 22."""
    machine_image: Identifier | None = None
    """AWS: AMI id. GCP: source image. Azure: publisher:offer:sku:version or a resource id. It has the GPU driver and Docker."""
    head_instance: Identifier | None = None
    """Type of the head, which needs no GPU. Default: m6i.2xlarge, n2-standard-8, Standard_D8s_v5."""
    reservation: Identifier | None = None
    """Capacity reservation to start GPU nodes in: an AWS id (cr-...), or the name of a GCP reservation."""
    capacity_block: bool = False
    """AWS: the reservation is a capacity block (bought for a time), not an on-demand one."""
    key_name: Identifier | None = None
    """AWS: name of the EC2 key pair of `ssh_key`."""
    ssh_user: Login = "ubuntu"
    """Login on the nodes."""
    ssh_key: Path = "~/.ssh/id_ed25519"
    """Private key of that login, on the machine that runs `cluster up`."""
    ssh_public_key: SshPublicKey | None = None
    """GCP: the public half, one line of text; it goes into the metadata of the nodes."""
    jump_host: (
        Annotated[
            Text, Field(pattern=r"^[A-Za-z0-9_.-]+@[A-Za-z0-9.-]+$", title="user@host", examples=["me@gateway.example.com"])
        ]
        | None
    ) = None
    """Host to reach the nodes through, if your machine is not in their network: they have private addresses only."""
    hosts: Annotated[list[Address], Field(examples=[["10.0.0.1", "10.0.0.2"]])] = []
    """Machines that run already: the head's address, then the workers'. With as many as `cluster.nodes` the head trains too, with
    one more it does not."""
    container: Image | None = None
    """Image that has the whole environment (cluster/image/Dockerfile), pinned by digest."""
    environment: Path | None = None
    """Without a container: folder of the virtual environment on every node."""
    mount_point: MountPoint = "/shared"
    """Folder where nodes see the shared storage."""
    shared_export: (
        Annotated[Text, Field(pattern=r"^[A-Za-z0-9.@_-]+:/[A-Za-z0-9._/-]*$", title="server:/path", examples=["10.0.0.9:/runs"])]
        | None
    ) = None
    """Export to mount there on cloud nodes: `server:/path`. Default: the machine image mounts it."""
    shared_kind: Literal["nfs4", "lustre"] = "nfs4"
    """How it is mounted."""
    nccl_profile: Path | None = None
    """GCP a3: file on the nodes that sets NCCL's environment for GPUDirect. Default: where its installer writes it."""
    token_file: Path = "~/.ray/auth_token"
    """Ray's authentication token on the machine that runs `cluster up`, which creates it if there is none."""
    hub_token_file: Path | None = None
    """Hugging Face token on that machine, to become every node's own login, as `hf auth login` would make it. Default: none."""
    kubernetes: KubernetesSection = KubernetesSection()
    """KubeRay only."""
