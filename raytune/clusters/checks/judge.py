"""What the facts of one machine mean for a run. Pure: facts in, findings out."""

from collections.abc import Sequence

from raytune.clusters.checks.facts import MachineFacts
from raytune.clusters.checks.finding import Finding, fail, ok, warn
from raytune.clusters.checks.seat import SeatFacts
from raytune.units import GIB, format_bytes, format_seconds
from raytune.versions import LIBRARIES

# A checkpoint of a small adapter run fits into the first; below the second even logs of Ray do not.
LITTLE_DISK, NO_DISK = 20 * GIB, GIB
# Docker gives 64 MiB. NCCL takes a few MiB per connection, data loaders and Ray's object store what they get.
LITTLE_SHARED_MEMORY, NO_SHARED_MEMORY = 2 * GIB, 256 * 2**20
LITTLE_MEMORY = 4 * GIB
OPEN_FILES = 4096
# The longest build of a DeepSpeed kernel that was seen takes three minutes.
STALE_LOCK_S = 600.0


def judge_machine(facts: MachineFacts, *, promised_gpus: float | None = None) -> list[Finding]:
    """Everything that one machine's facts decide alone.

    Args:
        promised_gpus: what Ray schedules on it; None where no Ray is asked.
    """
    return [
        judge_gpus(facts, promised_gpus),
        judge_driver(facts),
        judge_memory(facts),
        judge_shared_memory(facts),
        *(judge_disk(facts, use) for use in sorted(facts.disks)),
        judge_op_locks(facts),
        judge_token_file(facts),
        judge_open_files(facts),
    ]


def judge_gpus(facts: MachineFacts, promised: float | None) -> Finding:
    seen = _counted([f"{gpu.name} with {format_bytes(gpu.memory_bytes)}" for gpu in facts.gpus]) or "no GPU"
    if promised is None or promised == len(facts.gpus):
        return ok("GPUs", seen)
    if promised < len(facts.gpus):
        return warn(
            "GPUs",
            f"Ray uses {promised:g} of {seen}",
            "Restart Ray there (`ray stop`, `ray start`) so that it counts again, or leave it if the others are somebody else's.",
        )
    return fail(
        "GPUs",
        f"Ray promises {promised:g}, the driver lists {seen}",
        "Look at `nvidia-smi` and `dmesg` there: a GPU has dropped off, or Ray was started with a wrong --num-gpus. Replace the "
        "node, or restart Ray with what is there.",
    )


def judge_driver(facts: MachineFacts) -> Finding:
    if not facts.gpus:
        return ok("driver, CUDA, NCCL", f"not needed without a GPU (torch {facts.versions.get('torch', 'missing')})")
    seen = f"driver {facts.driver} (CUDA {facts.driver_cuda or '?'}), torch for CUDA {facts.torch_cuda}, NCCL {facts.nccl or '?'}"
    if facts.torch_cuda is None:
        return fail(
            "driver, CUDA, NCCL",
            f"torch {facts.versions.get('torch', 'missing')} is built for CPUs, and the machine has GPUs",
            "Install the build of torch for this driver's CUDA; pytorch.org names the index for `pip install torch --index-url`.",
        )
    if facts.driver_cuda and _major(facts.torch_cuda) > _major(facts.driver_cuda):
        return fail(
            "driver, CUDA, NCCL",
            seen,
            f"Update the driver to one for CUDA {_major(facts.torch_cuda)} or newer, or install a torch for CUDA "
            f"{_major(facts.driver_cuda)}.",
        )
    return ok("driver, CUDA, NCCL", seen)


def judge_memory(facts: MachineFacts) -> Finding:
    if facts.memory_bytes < LITTLE_MEMORY:
        return warn(
            "memory",
            format_bytes(facts.memory_bytes),
            f"A worker with its libraries takes 1 to 2 GiB before any model: use one worker, or a machine with "
            f"{format_bytes(LITTLE_MEMORY)} and more.",
        )
    return ok("memory", format_bytes(facts.memory_bytes))


def judge_shared_memory(facts: MachineFacts) -> Finding:
    seen = f"{format_bytes(facts.shared_memory_bytes)} free"
    fix = (
        "Make it larger: `docker run --shm-size=16g`, an emptyDir with `medium: Memory` in Kubernetes, or `mount -o "
        "remount,size=16G /dev/shm`."
    )
    if facts.shared_memory_bytes < NO_SHARED_MEMORY and facts.gpus:
        return fail("/dev/shm", f"{seen}; NCCL and data loaders fail without", fix)
    if facts.shared_memory_bytes < LITTLE_SHARED_MEMORY:
        return warn("/dev/shm", f"{seen}; Ray's object store falls back to the disk", fix)
    return ok("/dev/shm", seen)


def judge_disk(facts: MachineFacts, use: str) -> Finding:
    disk, name = facts.disks[use], f"disk of {use}"
    if disk.free_bytes is None:
        return ok(name, f"{disk.path}: size not known")
    seen = f"{format_bytes(disk.free_bytes)} free at {disk.path}"
    fix = (
        "Free some, or name a larger place: storage=FOLDER."
        if use == "storage"
        else "Free some, or start Ray with RAY_TMPDIR or --temp-dir on a larger disk."
    )
    if disk.free_bytes < NO_DISK:
        return fail(name, seen, fix)
    if disk.free_bytes < LITTLE_DISK:
        return warn(name, seen, f"{fix} `raytune plan` tells how large a checkpoint is.")
    return ok(name, seen)


def judge_op_locks(facts: MachineFacts) -> Finding:
    stale = [lock for lock in facts.op_locks if lock.age_s > STALE_LOCK_S]
    if stale:
        return fail(
            "kernel build locks",
            ", ".join(f"{lock.path} is {format_seconds(lock.age_s)} old" for lock in stale),
            f"A build was killed, and every later one waits for it for ever. If none is running: rm "
            f"{' '.join(lock.path for lock in stale)}",
        )
    return ok("kernel build locks", "a build is running" if facts.op_locks else "none")


def judge_token_file(facts: MachineFacts) -> Finding:
    if facts.token_file is None or facts.token_file_mode is None:
        return ok("token file", "none; for a cluster that wants a token, copy ~/.ray/auth_token of its head here (mode 600)")
    seen = f"{facts.token_file} has mode {facts.token_file_mode:03o}"
    if facts.token_file_mode & 0o077:
        return warn("token file", f"{seen}: other users can read it", f"chmod 600 {facts.token_file}")
    return ok("token file", seen)


def judge_open_files(facts: MachineFacts) -> Finding:
    if 0 <= facts.open_files < OPEN_FILES:  # -1: no limit
        return warn(
            "open files",
            f"limit {facts.open_files}",
            f"Ray opens a file per connection: `ulimit -n 65536` before Ray starts, or LimitNOFILE of its service; {OPEN_FILES} "
            f"at least.",
        )
    return ok("open files", "no limit" if facts.open_files < 0 else f"limit {facts.open_files}")


# --- Of the machine that raytune is started on ---------------------------------------------------------------------------------


def judge_seat(machine: MachineFacts, seat: SeatFacts) -> list[Finding]:
    """What the facts of this machine decide beyond those of any machine."""
    return [
        judge_python(seat),
        judge_requirements(seat),
        *([judge_torch(machine, seat)] if seat.torch_sees is not None else []),
        judge_cpu(seat),
        judge_ray_processes(seat),
        judge_ports(machine, seat),
        judge_cache(seat),
        judge_encoding(seat),
    ]


def judge_python(seat: SeatFacts) -> Finding:
    seen = f"{seat.python[0]}.{seat.python[1]}"
    if not (3, 11) <= seat.python < (3, 13):
        return fail("Python", seen, "Make the environment with Python 3.11 or 3.12: `python3.12 -m venv .venv`.")
    return ok("Python", seen)


def judge_requirements(seat: SeatFacts) -> Finding:
    from packaging.requirements import Requirement

    if seat.requirements is None:
        return warn(
            "packages",
            "raytune runs from a copied folder, so what it requires is not known here",
            "Install it: `pip install -e .` in a checkout, or `pip install raytune`.",
        )
    requirements = [Requirement(line) for line in seat.requirements]
    missing = [str(requirement) for requirement in requirements if requirement.name not in seat.installed]
    outside = [
        f"{requirement.name} {seat.installed[requirement.name]} (needs {requirement.specifier})"
        for requirement in requirements
        if requirement.name in seat.installed
        and not requirement.specifier.contains(seat.installed[requirement.name], prereleases=True)
    ]
    broken = [name for name in seat.missing_modules if name in seat.installed]
    problems = [*(f"{name} is missing" for name in missing), *outside, *(f"{name} cannot be imported" for name in broken)]
    if problems:
        names = dict.fromkeys(
            [*(requirement.name for requirement in requirements if requirement.name not in seat.installed)]
            + [line.split()[0] for line in outside]
            + broken
        )
        wanted = " ".join(f"'{requirement}'" for requirement in requirements if requirement.name in names)
        return fail(
            "packages", "; ".join(problems), f"pip install --force-reinstall {wanted}" if broken else f"pip install {wanted}"
        )
    versions = ", ".join(f"{name} {seat.installed[name]}" for name in LIBRARIES if name in seat.installed)
    return ok("packages", f"{len(requirements)} within their bounds: {versions}")


def judge_torch(machine: MachineFacts, seat: SeatFacts) -> Finding:
    if seat.torch_sees == f"{len(machine.gpus)} GPUs":
        return ok("torch", f"computes on {seat.torch_sees}")
    if seat.torch_sees is not None and seat.torch_sees.endswith(" GPUs"):
        return warn(
            "torch",
            f"sees {seat.torch_sees} of {len(machine.gpus)}",
            "CUDA_VISIBLE_DEVICES hides the others; unset it to train on all.",
        )
    return fail(
        "torch",
        f"cannot compute on the GPUs: {seat.torch_sees}",
        "Check that nobody else holds them (`nvidia-smi`), that torch fits the driver, and reboot after a driver update.",
    )


def judge_cpu(seat: SeatFacts) -> Finding:
    if seat.machine == "x86_64" and seat.cpu_flags and "avx2" not in seat.cpu_flags:
        return warn(
            "CPU",
            f"{seat.machine} without AVX2",
            "torch is several times slower on it: use a newer CPU, or the VM's `host` CPU model.",
        )
    best = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in seat.cpu_flags), None)
    return ok("CPU", f"{seat.machine} with {best}" if best else seat.machine)


def judge_ray_processes(seat: SeatFacts) -> Finding:
    servers = {pid: name for pid, name in seat.ray_processes.items() if not name.startswith("ray::")}
    workers = {pid: name for pid, name in seat.ray_processes.items() if name.startswith("ray::")}
    if workers and not servers:
        return warn(
            "Ray processes",
            f"{len(workers)} without a raylet: " + ", ".join(f"{name} ({pid})" for pid, name in sorted(workers.items())[:5]),
            f"A cluster has died and left them, with their memory and GPUs: kill {' '.join(str(pid) for pid in sorted(workers))}",
        )
    return ok("Ray processes", f"a cluster is running ({len(seat.ray_processes)} processes)" if servers else "none")


def judge_ports(machine: MachineFacts, seat: SeatFacts) -> Finding:
    ray_runs = any(name in ("raylet", "gcs_server") for name in seat.ray_processes.values())
    taken = [port for port in (6379, 8265) if port in seat.listening]
    has_token = machine.auth_mode == "token" or (machine.auth_mode is None and machine.token_file is not None)
    if seat.listening.get(8265) == "every address" and ray_runs and not has_token:
        return fail(
            "ports 6379, 8265",
            "Ray's dashboard listens on every address and asks for no token: who reaches it runs code here",
            "Start Ray with RAY_AUTH_MODE=token after `ray get-auth-token --generate`, without --dashboard-host=0.0.0.0, and "
            "reach it through a tunnel.",
        )
    if taken and not ray_runs:
        return warn(
            "ports 6379, 8265",
            f"{', '.join(str(port) for port in taken)} taken by something that is not your Ray",
            "`raytune train` needs neither; a cluster takes others with `ray start --head --port=6380 --dashboard-port=8266`.",
        )
    return ok("ports 6379, 8265", "used by Ray" if taken else "free")


def judge_cache(seat: SeatFacts) -> Finding:
    if not seat.cache_is_writable:
        return fail(
            "Hugging Face cache",
            f"{seat.cache} cannot be written to",
            "Set HF_HOME to a folder of yours with room for the models.",
        )
    return ok("Hugging Face cache", seat.cache + (", offline: only what lies there is found" if seat.is_offline else ""))


def judge_encoding(seat: SeatFacts) -> Finding:
    if seat.encoding.lower().replace("-", "") != "utf8":
        return warn("locale", seat.encoding, "Names and rows that are not ASCII would fail: export LC_ALL=C.UTF-8")
    return ok("locale", seat.encoding)


def _counted(names: Sequence[str]) -> str:
    """`8 × A, 1 × B`."""
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


def _major(version: str) -> int:
    return int(version.split(".")[0])
