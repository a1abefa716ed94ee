"""Claims about judging machines: each fact that stands in the way of a run is told with its node and its fix."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune.cli.checks import expected_rate
from raytune.clusters.checks.facts import Disk, GpuFacts, MachineFacts, OpLock, machine_facts
from raytune.clusters.checks.finding import Finding, fail, findings_json, findings_text, ok, over_nodes, warn, worst
from raytune.clusters.checks.judge import judge_machine, judge_seat
from raytune.clusters.checks.network import GLOO, expected_of, judge_network, network_of
from raytune.clusters.checks.nodes import (
    ClockReading,
    Reduction,
    is_slow,
    judge_alike,
    judge_all_reduce,
    judge_clocks,
    judge_names,
    judge_pairs,
    judge_shared_storage,
    judge_tokens,
    judge_versions,
    nodes_apart,
    rounds_of_pairs,
)
from raytune.clusters.checks.seat import SeatFacts, seat_facts
from raytune.clusters.preflight import instance_of
from raytune.config.load import config_from
from raytune.errors import UserError
from raytune.plan.costs.hardware import load_catalogue
from raytune.units import GIB, MIB

H100 = GpuFacts(name="NVIDIA H100 80GB HBM3", memory_bytes=80 * GIB)
A100 = GpuFacts(name="NVIDIA A100-SXM4-80GB", memory_bytes=80 * GIB)


def gpu_machine(**changes: object) -> MachineFacts:
    """A healthy machine with 8 GPUs, as `machine_facts` would describe it."""
    healthy = MachineFacts(
        host="gpu-1",
        versions={"raytune": "0.1.0", "python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0+cu128"},
        gpus=(H100,) * 8,
        driver="570.86",
        driver_cuda="12.8",
        torch_cuda="12.8",
        nccl="2.27.3",
        memory_bytes=2000 * GIB,
        shared_memory_bytes=1000 * GIB,
        disks={"scratch": Disk(path="/tmp", free_bytes=900 * GIB), "storage": Disk(path="/shared", free_bytes=9000 * GIB)},
        op_locks=(),
        auth_mode="token",
        token_file="/home/me/.ray/auth_token",
        token_file_mode=0o600,
        resolves_to=("10.0.0.1",),
        addresses={"lo": "127.0.0.1", "eth0": "10.0.0.1"},
        settings={},
        fabric_devices=("rdmap0",),
        open_files=65536,
    )
    return replace(healthy, **changes)  # pyright: ignore[reportArgumentType]


def seat(**changes: object) -> SeatFacts:
    healthy = SeatFacts(
        requirements=("ray[default]==2.60.0", "torch>=2.11,<2.14"),
        installed={"ray": "2.60.0", "torch": "2.13.0+cu128"},
        missing_modules=(),
        python=(3, 12),
        machine="x86_64",
        cpu_flags=frozenset({"avx2"}),
        listening={22: "every address"},
        ray_processes={},
        cache="/home/me/.cache/huggingface/hub",
        cache_is_writable=True,
        is_offline=False,
        encoding="utf-8",
        torch_sees="8 GPUs",
    )
    return replace(healthy, **changes)  # pyright: ignore[reportArgumentType]


def test_a_healthy_machine_passes_every_check():
    findings = [*judge_machine(gpu_machine(), promised_gpus=8), *judge_seat(gpu_machine(), seat())]
    assert [finding for finding in findings if finding.status != "ok"] == []


@pytest.mark.parametrize(
    ("changes", "name", "status", "seen", "fix"),
    [
        ({"gpus": (H100,) * 7}, "GPUs", "fail", "Ray promises 8, the driver lists 7 × NVIDIA H100", "nvidia-smi"),
        ({"gpus": (H100,) * 9}, "GPUs", "warn", "Ray uses 8 of 9", "Restart Ray"),
        ({"torch_cuda": None}, "driver, CUDA, NCCL", "fail", "built for CPUs", "build of torch"),
        ({"driver_cuda": "11.8"}, "driver, CUDA, NCCL", "fail", "(CUDA 11.8), torch for CUDA 12.8", "Update the driver"),
        ({"memory_bytes": 2 * GIB}, "memory", "warn", "2 GiB", "one worker"),
        ({"shared_memory_bytes": 64 * MIB}, "/dev/shm", "fail", "64 MiB", "--shm-size"),
        ({"shared_memory_bytes": GIB}, "/dev/shm", "warn", "1 GiB", "--shm-size"),
        (
            {"disks": {"storage": Disk(path="/s", free_bytes=MIB)}},
            "disk of storage",
            "fail",
            "1 MiB free at /s",
            "storage=FOLDER",
        ),
        (
            {"disks": {"scratch": Disk(path="/t", free_bytes=9 * GIB)}},
            "disk of scratch",
            "warn",
            "9 GiB free at /t",
            "--temp-dir",
        ),
        ({"op_locks": (OpLock(path="/c/lock", age_s=7200),)}, "kernel build locks", "fail", "/c/lock is 2h00m old", "rm /c/lock"),
        ({"token_file_mode": 0o644}, "token file", "warn", "has mode 644", "chmod 600 /home/me/.ray/auth_token"),
        ({"open_files": 1024}, "open files", "warn", "limit 1024", "ulimit -n 65536"),
    ],
)
def test_what_is_wrong_with_a_machine_is_told_with_its_fix(changes: dict, name: str, status: str, seen: str, fix: str):
    findings = {finding.name: finding for finding in judge_machine(gpu_machine(**changes), promised_gpus=8)}
    assert findings[name].status == status
    assert seen in findings[name].seen
    assert fix in findings[name].fix
    assert [other for other, finding in findings.items() if finding.status != "ok"] == [name]


def test_what_is_right_is_not_complained_about():
    assert worst(judge_machine(gpu_machine(op_locks=(OpLock(path="/c/lock", age_s=60),)))) == "ok"  # a build is running
    assert worst(judge_machine(gpu_machine(disks={"storage": Disk(path="s3://b", free_bytes=None)}))) == "ok"
    assert worst(judge_machine(gpu_machine(open_files=-1))) == "ok"
    cpu = gpu_machine(gpus=(), driver=None, driver_cuda=None, torch_cuda=None, nccl=None)
    assert worst(judge_machine(cpu, promised_gpus=0)) == "ok"


@pytest.mark.parametrize(
    ("changes", "name", "status", "seen", "fix"),
    [
        ({"python": (3, 10)}, "Python", "fail", "3.10", "python3.12"),
        ({"python": (3, 13)}, "Python", "fail", "3.13", "python3.12"),
        ({"installed": {"torch": "2.13.0"}}, "packages", "fail", "ray[default]==2.60.0 is missing", "'ray[default]==2.60.0'"),
        (
            {"installed": {"ray": "2.59.0", "torch": "2.13.0"}},
            "packages",
            "fail",
            "ray 2.59.0 (needs ==2.60.0)",
            "'ray[default]==",
        ),
        ({"missing_modules": ("torch",)}, "packages", "fail", "torch cannot be imported", "--force-reinstall 'torch"),
        ({"requirements": None}, "packages", "warn", "not known", "pip install"),
        ({"torch_sees": "4 GPUs"}, "torch", "warn", "4 GPUs of 8", "CUDA_VISIBLE_DEVICES"),
        ({"torch_sees": "CUDA error: out of memory"}, "torch", "fail", "out of memory", "nvidia-smi"),
        ({"cpu_flags": frozenset({"sse2"})}, "CPU", "warn", "without AVX2", "newer CPU"),
        ({"ray_processes": {7: "ray::RayTrainWorker"}}, "Ray processes", "warn", "ray::RayTrainWorker (7)", "kill 7"),
        ({"listening": {8265: "this machine or one address"}}, "ports 6379, 8265", "warn", "8265", "--dashboard-port"),
        ({"cache_is_writable": False}, "Hugging Face cache", "fail", "cannot be written", "HF_HOME"),
        ({"encoding": "ascii"}, "locale", "warn", "ascii", "C.UTF-8"),
    ],
)
def test_what_is_wrong_with_the_place_to_start_from_is_told_with_its_fix(
    changes: dict, name: str, status: str, seen: str, fix: str
):
    findings = {finding.name: finding for finding in judge_seat(gpu_machine(), seat(**changes))}
    assert (findings[name].status, seen in findings[name].seen, fix in findings[name].fix) == (status, True, True), findings[name]
    assert [other for other, finding in findings.items() if finding.status != "ok"] == [name]


def test_a_dashboard_that_is_open_to_everybody_fails_and_one_with_a_token_does_not():
    running = seat(listening={8265: "every address", 6379: "every address"}, ray_processes={1: "raylet", 2: "gcs_server"})
    (opened,) = [one for one in judge_seat(gpu_machine(auth_mode="disabled"), running) if one.name.startswith("ports")]
    assert (opened.status, "RAY_AUTH_MODE=token" in opened.fix) == ("fail", True)
    (guarded,) = [one for one in judge_seat(gpu_machine(auth_mode="token"), running) if one.name.startswith("ports")]
    assert guarded.status == "ok"


def test_a_look_at_this_machine_finds_its_packages_and_its_memory():
    machine = machine_facts("/tmp")
    here = seat_facts(machine.gpus)
    assert set(machine.disks) == {"scratch", "storage"}
    assert machine.memory_bytes > GIB
    assert machine.addresses["lo"] == "127.0.0.1"
    assert here.requirements is not None
    assert {"ray", "torch", "deepspeed", "pydantic"} <= here.installed.keys()


# --- Several nodes -------------------------------------------------------------------------------------------------------------

NODES = {f"gpu-{index}": gpu_machine(host=f"gpu-{index}", resolves_to=(f"10.0.0.{index}",)) for index in (1, 2, 3)}


def changed(node: str, **changes: object) -> dict[str, MachineFacts]:
    return {**NODES, node: replace(NODES[node], **changes)}  # pyright: ignore[reportArgumentType]


def test_equal_nodes_pass():
    judges: list[Callable[[dict[str, MachineFacts]], Finding]] = [
        judge_versions,
        judge_alike,
        judge_names,
        lambda nodes: judge_tokens(nodes, is_reachable=True),
    ]
    assert [judge(NODES).status for judge in judges] == ["ok"] * 4


def test_a_node_with_another_version_is_named_with_both():
    finding = judge_versions(changed("gpu-2", versions=NODES["gpu-2"].versions | {"ray": "2.59.0"}))
    assert (finding.status, finding.seen) == ("fail", "ray: 2.59.0 on gpu-2; 2.60.0 elsewhere")
    missing = judge_versions(changed("gpu-3", versions={"raytune": "0.1.0", "python": "3.11.7", "ray": "2.60.0"}))
    assert missing.seen == "torch: missing on gpu-3; 2.13.0+cu128 elsewhere"


def test_a_node_with_other_gpus_is_named():
    finding = judge_alike(changed("gpu-2", gpus=(A100,) * 8))
    assert (finding.status, finding.seen) == (
        "warn",
        "gpu-2 has 8 × NVIDIA A100-SXM4-80GB; 8 × NVIDIA H100 80GB HBM3 elsewhere",
    )
    assert judge_alike(changed("gpu-2", gpus=())).status == "ok"  # a head without GPUs


def test_a_node_whose_name_leads_to_itself_is_named_unless_the_interface_is_set():
    finding = judge_names(changed("gpu-2", resolves_to=("127.0.1.1",)))
    assert (finding.status, finding.seen) == ("fail", "gpu-2 resolves its own name to 127.0.1.1")
    assert judge_names(changed("gpu-2", resolves_to=())).seen == "gpu-2 resolves its own name to nothing"
    assert judge_names(changed("gpu-2", resolves_to=("127.0.1.1",), settings={"GLOO_SOCKET_IFNAME": "eth0"})).status == "ok"
    assert judge_names({"one": gpu_machine(resolves_to=("127.0.0.1",))}).status == "ok"


def test_a_cluster_without_a_token_is_told_and_one_that_disagrees_fails():
    assert judge_tokens({"a": gpu_machine(auth_mode=None)}, is_reachable=True).status == "warn"
    assert judge_tokens({"a": gpu_machine(auth_mode=None)}, is_reachable=False).status == "ok"
    assert judge_tokens(changed("gpu-2", auth_mode="disabled"), is_reachable=True).status == "fail"


def test_only_a_clock_that_is_surely_off_is_told():
    def reading(ahead_s: float, round_trip_s: float) -> ClockReading:
        return ClockReading(ahead_s=ahead_s, round_trip_s=round_trip_s)

    off = judge_clocks({"a": [reading(0.0, 0.001)], "b": [reading(-9.0, 8.0), reading(-5.0, 0.2)]})
    assert (off.status, off.seen) == ("warn", "b is 5.0 s behind (± 0.1 s)")
    assert judge_clocks({"a": [reading(3.0, 4.0)]}).status == "ok"  # the way alone may explain 2 s of it
    assert judge_clocks({"a": [reading(1.9, 0.0)]}).status == "ok"


def test_a_node_with_a_storage_of_its_own_is_named_among_three():
    nodes = ["a", "b", "c"]
    failures = dict.fromkeys([("a", "b"), ("b", "a"), ("c", "b"), ("b", "c")], "the file is not there")
    finding = judge_shared_storage("/runs", failures, nodes)
    assert (finding.status, finding.seen) == ("fail", "/runs on b is not the one that the other nodes have")


def test_of_two_nodes_with_storages_of_their_own_both_are_named():
    finding = judge_shared_storage(
        "/runs", {("a", "b"): "the file is not there", ("b", "a"): "the file is not there"}, ["a", "b"]
    )
    assert finding.seen == "b does not read what a wrote to /runs: the file is not there; 2 such pairs"
    alone = judge_shared_storage("/runs", {("b", "b"): "Permission denied", ("b", "a"): "?"}, ["a", "b"])
    assert alone.seen == "b: Permission denied"


@given(st.integers(3, 40), st.data())
def test_one_node_apart_is_found_in_any_number_of_nodes(num_nodes: int, data: st.DataObject):
    nodes = [str(index) for index in range(num_nodes)]
    apart = data.draw(st.sampled_from(nodes))
    failures = {(one, other): "gone" for one in nodes for other in nodes if (one == apart) != (other == apart)}
    assert nodes_apart(failures, nodes) == [apart]
    assert nodes_apart({}, nodes) == []
    assert nodes_apart({(one, other): "gone" for one in nodes for other in nodes if one != other}, nodes) == []


@given(st.integers(0, 65))
def test_pairs_make_a_ring_and_share_no_node_in_a_round(num_nodes: int):
    nodes = [str(index) for index in range(num_nodes)]
    rounds = rounds_of_pairs(nodes)
    pairs = [pair for one_round in rounds for pair in one_round]
    assert len(set(map(frozenset, pairs))) == len(pairs) == {0: 0, 1: 0, 2: 1}.get(num_nodes, num_nodes)
    for one_round in rounds:
        together = [node for pair in one_round for node in pair]
        assert len(together) == len(set(together))


@given(st.integers(3, 30), st.data())
def test_the_slow_node_is_found_by_its_pairs(num_nodes: int, data: st.DataObject):
    nodes = [str(index) for index in range(num_nodes)]
    slow = data.draw(st.sampled_from(nodes))
    pairs = {
        pair: Reduction(num_bytes=GIB, seconds=1.0 if slow in pair else data.draw(st.floats(0.1, 0.12)), num_ranks=2)
        for one_round in rounds_of_pairs(nodes)
        for pair in one_round
    }
    finding = judge_pairs(pairs, nodes)
    assert finding.status == "fail"
    assert finding.seen.startswith(f"{slow} reaches 1.07 GB/s")


def test_equal_pairs_name_nobody():
    pairs = {pair: Reduction(num_bytes=GIB, seconds=0.1, num_ranks=2) for pair in [("a", "b"), ("b", "c"), ("c", "a")]}
    assert judge_pairs(pairs, ["a", "b", "c"]).status == "ok"


def test_bus_bandwidth_is_counted_as_nccl_tests_does():
    assert Reduction(num_bytes=8 * 10**9, seconds=1.0, num_ranks=8).bytes_per_s == 14e9
    assert Reduction(num_bytes=10**9, seconds=1.0, num_ranks=2).bytes_per_s == 1e9


@pytest.mark.parametrize(("seconds", "status"), [(1.0, "ok"), (1.4, "warn"), (4.0, "fail")])
def test_an_all_reduce_is_held_against_what_the_network_should_give(seconds: float, status: str):
    slow = [Reduction(num_bytes=10**6, seconds=1.0, num_ranks=2), Reduction(num_bytes=10**9, seconds=seconds, num_ranks=2)]
    finding = judge_all_reduce(slow, 1e9)
    assert finding.status == status
    assert is_slow(finding, 1e9) == (status != "ok")
    assert judge_all_reduce(slow, None).status == "ok"
    assert is_slow(judge_all_reduce(slow, None), None)  # nothing says that it is fast
    assert judge_all_reduce([], 1e9).seen == "one worker, nothing to reduce"


# --- Words ---------------------------------------------------------------------------------------------------------------------


def test_one_line_tells_what_all_nodes_have_or_who_stands_out():
    alike = over_nodes([("a", ok("memory", "2 GiB")), ("b", ok("memory", "2 GiB"))])
    assert alike == ok("memory", "2 nodes: 2 GiB")
    assert over_nodes([("a", ok("memory", "2 GiB")), ("b", ok("memory", "3 GiB"))]).seen == "2 nodes: 1 × 2 GiB; 1 × 3 GiB"
    mixed = over_nodes(
        [("a", ok("m", "x")), ("b", warn("m", "y", "do b")), ("c", fail("m", "z", "do c")), ("d", fail("m", "z", "do c"))]
    )
    assert mixed == fail("m", "b: y; c, d: z", "do c")


def test_findings_are_a_table_with_fixes_and_a_count():
    findings = [ok("memory", "2 GiB"), fail("/dev/shm", "64 MiB free", "make it larger")]
    assert findings_text(findings).splitlines() == [
        "ok    memory    2 GiB",
        "FAIL  /dev/shm  64 MiB free",
        "                fix: make it larger",
        "2 checks: 1 ok, 0 to look at, 1 failed",
    ]
    assert findings_json(findings) == {
        "ok": False,
        "checks": [
            {"name": "memory", "status": "ok", "seen": "2 GiB", "fix": ""},
            {"name": "/dev/shm", "status": "fail", "seen": "64 MiB free", "fix": "make it larger"},
        ],
    }


def test_a_rate_that_is_expected_is_written_as_a_size() -> None:
    assert expected_rate("10GB/s") == 10e9
    assert expected_rate(None) is None
    with pytest.raises(UserError, match="--expect"):
        expected_rate("fast")


# --- The network between nodes -------------------------------------------------------------------------------------------------

P5 = load_catalogue().instance("p5.48xlarge")
# As NCCL 2.2x and 2.3x, aws-ofi-nccl 1.5 to 1.2x and Google's plug-ins write them.
LOGS = {
    "AWS Libfabric (provider efa, 32 cards)": """
ip-10-0-0-1:81:90 [0] NCCL INFO NET/OFI Selected provider is efa, fabric is efa-direct (found 32 nics)
ip-10-0-0-1:81:90 [0] NCCL INFO Initialized NET plugin AWS Libfabric
ip-10-0-0-1:81:90 [0] NCCL INFO Using network AWS Libfabric
""",
    "Libfabric (provider efa, 4 cards)": """
[1] NCCL INFO NET/OFI Selected Provider is efa (found 4 nics)
[1] NCCL INFO Using network Libfabric
""",
    "AWS Libfabric (provider tcp;ofi_rxm, 1 card)": """
[0] NCCL INFO NET/OFI Selected provider is tcp;ofi_rxm, fabric is 10.0.0.0/20 (found 1 nics)
[0] NCCL INFO Using network AWS Libfabric
""",
    "IB (8 cards, IB)": "[0] NCCL INFO NET/IB : Using "
    + " ".join(f"[{card}]mlx5_{card}:1/IB" for card in range(8))
    + " [RO]; OOB eth0:10.0.0.4<0>\n[0] NCCL INFO Using network IB\n",
    "IB (mlx5_0, RoCE)": "NCCL INFO NET/IB : Using [0]mlx5_0:1/RoCE [RO]; OOB eth0:10.0.0.4<0>\nNCCL INFO Using network IB\n",
    "Socket (eth0)": "[0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.4<0>\n[0] NCCL INFO Using network Socket\n",
    "FasTrak": "NCCL INFO Initializing network FasTrak, version: 1.0.17\nNCCL INFO Using network FasTrak\n",
    "GPUDirectTCPX_v7": "NCCL INFO Using network GPUDirectTCPX_v7\n",
}
NETWORKS = {name: network_of(log) for name, log in LOGS.items()}


def test_nccls_log_says_which_network_it_took():
    assert {name: str(network) for name, network in NETWORKS.items()} == {name: name for name in LOGS}
    assert network_of("NCCL INFO Bootstrap : Using eth0:10.0.0.4<0>\n") is None


FAST = {
    "p5.48xlarge": {"AWS Libfabric (provider efa, 32 cards)", "Libfabric (provider efa, 4 cards)"},
    "Standard_ND96isr_H100_v5": {"IB (8 cards, IB)", "IB (mlx5_0, RoCE)"},
    "a3-megagpu-8g": {"FasTrak"},
    "a3-highgpu-8g": {"GPUDirectTCPX_v7"},
}


@pytest.mark.parametrize("instance", FAST)
def test_a_substitute_for_the_fast_network_fails_by_name_with_what_to_do(instance: str):
    nodes = load_catalogue().instance(instance)
    for name, network in NETWORKS.items():
        finding = judge_network({"a": network, "b": network}, nodes, {})
        assert (finding.status == "ok") == (name in FAST[instance]), name
        if finding.status != "ok":
            assert f"NCCL took {name} on a, b; {instance} has" in finding.seen
            assert "firewall" not in finding.fix


def test_nodes_that_took_different_networks_fail_and_one_node_uses_none():
    fast, slow = NETWORKS["AWS Libfabric (provider efa, 32 cards)"], NETWORKS["Socket (eth0)"]
    mixed = judge_network({"a": fast, "b": fast, "c": slow}, P5, {})
    assert (mixed.status, "Socket (eth0) on c" in mixed.seen) == ("fail", True)
    assert judge_network({"a": slow}, P5, {}).status == "ok"
    assert judge_network({"a": None, "b": None}, P5, {}).status == "warn"
    assert judge_network({"a": GLOO, "b": GLOO}, None, {}) == ok("network", "2 nodes: gloo (TCP)")


def test_sockets_beside_idle_cards_are_told_where_the_type_of_the_nodes_is_not_known():
    slow = NETWORKS["Socket (eth0)"]
    finding = judge_network({"a": slow, "b": slow}, None, {"a": ("mlx5_0",), "b": ("mlx5_0",)})
    assert (finding.status, "although a, b has mlx5_0" in finding.seen) == ("warn", True)
    assert judge_network({"a": slow, "b": slow}, None, {"a": (), "b": ()}).status == "ok"


def test_what_is_expected_is_a_share_of_what_the_instance_type_has_for_the_gpus_in_use():
    gpu = load_catalogue().gpu_of(P5)
    assert expected_of(P5, gpu, 8).bytes_per_s == 0.8 * P5.inter_bytes_per_s
    assert expected_of(P5, gpu, 8).why == "80% of the 400 GB/s of p5.48xlarge"
    few = expected_of(P5, gpu, 2)
    assert (few.bytes_per_s, "2 of its 8 GPUs" in few.why) == (0.2 * P5.inter_bytes_per_s, True)


def test_the_bar_is_stated_and_sockets_on_p5_are_far_below_it():
    wanted = expected_of(P5, load_catalogue().gpu_of(P5), 8)
    sockets = [Reduction(num_bytes=10**9, seconds=0.2, num_ranks=16)]
    finding = judge_all_reduce(sockets, wanted.bytes_per_s, wanted.why)
    assert finding.status == "fail"
    assert "3% of the expected 320 GB/s (80% of the 400 GB/s of p5.48xlarge); fails below 50%, 160 GB/s" in finding.seen


def test_the_type_of_the_nodes_is_what_is_said_or_what_all_of_them_say_they_are():
    on_p5 = config_from({"cluster": {"instance": "p5.48xlarge"}}).cluster
    nobody_says = config_from({}).cluster
    p4, other = gpu_machine(product="p4d.24xlarge"), gpu_machine(product="Virtual Machine")
    assert instance_of(on_p5, [other]) == P5
    assert instance_of(nobody_says, [p4, p4]) == load_catalogue().instance("p4d.24xlarge")
    assert instance_of(nobody_says, [p4, other]) is None
    assert instance_of(nobody_says, [other, replace(p4, gpus=())]) is None
