"""How fast rows are streamed from an object store that takes its time for each request, with and without reading ahead.

    python -m tests.bench.streaming --output

The store is moto's on this machine, behind a proxy that holds back each request. What is measured is rows as they are read, and
nothing made of them: as fast as the quickest run could use them. A line each: how the same bytes are divided into files, and
MB/s of them, from a disk and from the store.
"""

import argparse
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raytune.data.files.readers import read_segment
from raytune.data.files.sources import unread_parts
from raytune.units import MIB
from tests.bench.measure import report
from tests.tiny import tiny_rows
from tests.unit.test_data_stream import recipe

WINDOW = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency-ms", type=float, default=200.0)
    parser.add_argument("--megabytes", type=int, default=32)
    parser.add_argument("--output", action="store_true", help="append the figures to tests/bench/baselines/streaming.jsonl")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, slow_store(asked.latency_ms / 1e3) as (bucket, put):
        for num_files in (1, asked.megabytes):
            folder = Path(scratch) / str(num_files)
            size = write_files(folder, asked.megabytes * MIB, num_files)
            for file in sorted(folder.iterdir()):
                put(file, f"{num_files}/{file.name}")
            far = f"{bucket}/{num_files}/*.jsonl"
            speeds = {
                "from a disk": speed(f"{folder}/*.jsonl", 0, size),
                "nothing ahead": speed(far, 0, size),
                "64 MiB ahead": speed(far, 64, size),
            }
            figures = {"files": num_files, "megabytes": asked.megabytes, "latency_ms": asked.latency_ms}
            rounded = {name: round(number, 2) for name, number in speeds.items()}
            report("streaming", figures | {"mb_per_s": rounded}, asked.output)


def write_files(folder: Path, num_bytes: int, num_files: int) -> int:
    """The same rows in one file or many; their bytes."""
    folder.mkdir()
    lines = [json.dumps(row) + "\n" for row in tiny_rows(2000)]
    lines *= num_bytes // sum(map(len, lines)) + 1
    per_file = -(-len(lines) // num_files)
    for number in range(num_files):
        (folder / f"rows-{number:03}.jsonl").write_text("".join(lines[number * per_file : (number + 1) * per_file]))
    return sum(map(len, lines))


def speed(path: str, read_ahead_mib: int, size: int) -> float:
    """MB/s of one pass."""
    made = recipe(path, WINDOW, read_ahead_mib=read_ahead_mib)
    began = time.perf_counter()
    for file in made.files[0]:
        for part in unread_parts(file):
            for _ in read_segment(part):
                pass
    made.close()
    return size / (time.perf_counter() - began) / 1e6


@contextmanager
def slow_store(latency_s: float) -> Iterator[tuple[str, Callable[[Path, str], None]]]:
    """A bucket in a store that holds back each request, and what puts a file into it without waiting."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    upstream = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    quick = fsspec.filesystem("s3", key="test", secret="test", endpoint_url=f"http://{upstream[0]}:{upstream[1]}")
    quick.makedirs("rows")
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(listener, upstream, latency_s), daemon=True).start()
    os.environ.update(keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{listener.getsockname()[1]}"})
    yield "s3://rows", lambda file, name: quick.put_file(str(file), f"rows/{name}")
    listener.close()
    server.stop()


def _accept(listener: socket.socket, upstream: tuple[str, int], latency_s: float) -> None:
    with suppress(OSError):
        while True:
            client, _ = listener.accept()
            above = socket.create_connection(upstream)
            threading.Thread(target=_pump, args=(client, above, latency_s), daemon=True).start()
            threading.Thread(target=_pump, args=(above, client, 0.0), daemon=True).start()


def _pump(source: socket.socket, target: socket.socket, wait_s: float) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 18):  # a request without a body comes in one piece
            time.sleep(wait_s)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    main()
