"""Every file name of a run, in one place. Standard library only; reading and writing is `storage`'s.

    <storage>/<name>/
        run.json                    identity: config as resolved, versions, fingerprints, state
        plan.json                   the RunPlan
        metrics.jsonl               one line per logged step or evaluation
        events.jsonl                starts, saves, failures, retries
        failures/attempt-1.rank-0.json   what ended a worker
        checkpoints/step-00000100/  a committed checkpoint; MANIFEST.json lists its files with sizes and hashes
        model/                      the final weights, in Hugging Face format
        samples.jsonl               generated answers, base against tuned
    <storage>/stores/<hash>/        tokenised data, shared by runs
"""

import re
from dataclasses import dataclass

MANIFEST = "MANIFEST.json"
STEP_FOLDER = re.compile(r"^step-(\d{8})$")


def step_folder(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run below `storage`, a local folder or an fsspec URL."""

    storage: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.storage.rstrip('/')}/{self.name}"

    @property
    def run(self) -> str:
        return f"{self.path}/run.json"

    @property
    def plan(self) -> str:
        return f"{self.path}/plan.json"

    @property
    def metrics(self) -> str:
        return f"{self.path}/metrics.jsonl"

    @property
    def events(self) -> str:
        return f"{self.path}/events.jsonl"

    @property
    def checkpoints(self) -> str:
        return f"{self.path}/checkpoints"

    @property
    def model(self) -> str:
        return f"{self.path}/model"

    @property
    def samples(self) -> str:
        return f"{self.path}/samples.jsonl"

    @property
    def failures(self) -> str:
        return f"{self.path}/failures"

    @property
    def ray(self) -> str:
        """Folder that Ray Train keeps its own files in; nothing of ours depends on it."""
        return f"{self.path}/ray"

    def checkpoint(self, step: int) -> str:
        return f"{self.checkpoints}/{step_folder(step)}"

    def failure(self, attempt: int, rank: int) -> str:
        return f"{self.failures}/attempt-{attempt}.rank-{rank}.json"
