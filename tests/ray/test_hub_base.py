"""A run whose base lies on a hub: from an empty cache to an adapter that names the model and its commit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raytune.metrics.events import read_events
from raytune.plan.model.base_model import DEMO_BASE
from tests.hub_stand_in import Refusal, StandIn, serving

ROOT = Path(__file__).parents[2]
NAME = "owner/tiny"

RUN = f"""
name: run
model: {{base: {NAME}}}
data: {{train: {{path: "demo:train", max_rows: 40}}, max_length: 512}}
training: {{max_steps: 2, per_device_train_batch_size: 1, gradient_accumulation_steps: 1}}
cluster: {{workers: 2}}
"""


def train(hub: StandIn, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    (folder / "run.yaml").write_text(RUN)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "launch.py", "train", str(folder / "run.yaml"), f"storage={folder / 'runs'}", *overrides]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_downloads_its_base_once_for_two_workers_and_names_its_commit(tmp_path: Path) -> None:
    with serving() as hub:
        commit = hub.add_folder(NAME, DEMO_BASE, {"pytorch_model.bin": b"a pickle", "modeling.py": b"raise SystemExit"})
        hub.refusals["/resolve/"] = [Refusal(403, {"X-Error-Code": "GatedRepo"})]
        refused = train(hub, tmp_path)
        assert (refused.returncode, "is gated" in refused.stderr, (tmp_path / "runs").exists()) == (2, True, False)

        hub.cut_after, hub.num_cuts = 1_000_000, 1
        done = train(hub, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        run = tmp_path / "runs" / "run"
        adapter = json.loads((run / "model" / "adapter_config.json").read_text())
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == (NAME, commit)
        assert json.loads((run / "plan.json").read_text())["model"]["content"] == {"commit": commit}
        assert hub.sent["model.safetensors"] == (DEMO_BASE / "model.safetensors").stat().st_size
        assert not {"pytorch_model.bin", "modeling.py"} & set(hub.sent)
        assert not (run / "downloads").exists()
        assert [event["attempt"] for event in read_events(run / "events.jsonl") if event["event"] == "attempt_started"] == [1]
