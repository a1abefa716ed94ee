"""Work that ends by Ctrl-C when some of it is done."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def interrupted_in(chunks: Path, work: Callable[[], Any]) -> list[Path]:
    """Interrupt some work as soon as a chunk of it is kept; the chunks that were by then."""

    def kept() -> list[Path]:
        return sorted(path for path in chunks.iterdir() if path.suffix == ".json") if chunks.is_dir() else []

    def interrupt() -> None:
        while not kept():
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        work()
    watcher.join()
    return kept()
