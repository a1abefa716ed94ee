"""Every file name of a run, in one place. Standard library only; reading and writing is `storage`'s.

<storage>/<name>/
    run.json                    identity: config as resolved, versions, attempts, state
    plan.json                   the RunPlan, with what became of the rows
    metrics.jsonl               one line per logged step or evaluation
    events.jsonl                starts, saves, failures, retries
    failures/attempt-1.rank-0.json   what ended a worker
            /attempt-1.whereabouts.json   where the others were when it was lost
    tracking/mlflow.json        the run of a tracker that this one is, and what it has been told
    places/attempt-1.json       the node of each rank
    logs/attempt-1/rank-0.log   what a worker printed; rank-0.older.log is what came before, where that was much
    downloads/NODE.json         how far a node is with the base of a hub; gone when it is there
    lease/3.json                the command that is at work on this run, and its heartbeat; gone when it ends
    requests/save, stop         what somebody asks of the command and of its workers (`raytune top`); gone when it was done
    checkpoints/FENCE.json      number of the newest attempt; an older one commits nothing any more
    checkpoints/step-00000100/  a committed checkpoint; MANIFEST.json lists its files with sizes and hashes
               /step-00000100.tmp-2, .deleted-2   being written, being removed by attempt 2
               /step-00000100.damaged             set aside: its files are not what the manifest says
    exports/step-00000100.1f0c9b/    the model after a step, for suites that are measured while training goes on; like model/
           /.../EXPORT.json     written last: before, nobody reads the folder
           /READING.json        the export that is being measured, and stays for that
    while_training/step-00000100.json   what suites came to on an export
                  /GIVEN_UP.json   there while nobody measures any more, and why
    importance/rank-0.safetensors    by how much each weight is held under EWC; a file per rank where ranks share it
              /MANIFEST.json    what it was estimated from; written last
    model/                      the final weights, in Hugging Face format
         /README.md             the model card (`raytune report`); stays as it is once somebody has edited it
    result.json                 final metrics, best step, base against tuned, sizes of the model's files; written last,
                                when the driver adds time, dollars, changes in words and what looks wrong
    samples.jsonl               rows of suites, base against tuned
    report.html  figures/       the page and its figures, drawn from these (`raytune report`)
    scores/NAME.jsonl           the loss of each row of a data set (`raytune score`)
    evaluations/NAME/           models on suites (`raytune evaluate`): result.json, samples.jsonl, chunks/ of answers
<storage>/stores/<hash>/        tokenised data, shared by runs
                /draft-<hash>/  such data while it is made (data.drafts)

<storage>/rates/<name of a run>/    what `raytune find-rate` leaves; a second one is called NAME-2
    rates.jsonl                 a line per step: rate, loss, smoothed loss
    result.json                 the range, what the curve says, the rates it names; written last
    report.html  figures/       the page and its figure, drawn from these

<storage>/<name of a cross-validation>/    what `raytune train --folds` leaves
    fold-0/                     the run folder of a fold
    folds.json                  metrics of all folds, mean and spread; written last

<storage>/<name of a sweep>/
    sweep.json                  identity: config as resolved
    ledger.jsonl                trials, what was decided about them, how they ended; the truth that a sweep resumes from
    trials/trial-007/           the run folder of a trial
    result.json                 every trial ranked; written last
    trials.jsonl  trials.csv    the same, a line per trial
    best.yaml                   config that trains the winner again
    report.html  figures/       the page and its figures
    tune/                       Ray Tune's own files, an experiment per command
"""

import re
from dataclasses import dataclass

BESIDE_RUNS = ("stores", "rates")
"""Folders of a storage that are no runs, where a run is not called so."""
MANIFEST = "MANIFEST.json"
MODEL_CARD = "README.md"
"""In the folder of a model; of a finished run it is no part of what the run left, since anybody may edit it."""
LAYOUT_FILE = "engine.json"
"""How the training state beside it is cut (plan.division.Layout)."""
EXPORT = "EXPORT.json"
"""Written last into an export."""
EXPORT_FOLDER = re.compile(r"^step-(\d{8})\.[0-9a-f]+$")
SUITE_RESULT = re.compile(r"^step-(\d{8})\.json$")
DAMAGED_MANIFEST = "MANIFEST.damaged.json"
STEP_FOLDER = re.compile(r"^step-(\d{8})$")
UNFINISHED_FOLDER = re.compile(r"^step-\d{8}\.(?:tmp|deleted)-(\d+)$")
DAMAGED_FOLDER = re.compile(r"^step-\d{8}\.damaged$")


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
    def fence(self) -> str:
        return f"{self.checkpoints}/FENCE.json"

    @property
    def importance(self) -> str:
        """Folder of what EWC estimates (training.importance)."""
        return f"{self.path}/importance"

    @property
    def model(self) -> str:
        return f"{self.path}/model"

    @property
    def model_card(self) -> str:
        return f"{self.model}/{MODEL_CARD}"

    @property
    def exports(self) -> str:
        """Folder of models that are measured while training goes on."""
        return f"{self.path}/exports"

    @property
    def reading(self) -> str:
        """Names the export that is being measured."""
        return f"{self.exports}/READING.json"

    @property
    def while_training(self) -> str:
        """Folder of what suites came to on exports."""
        return f"{self.path}/while_training"

    def suite_result(self, step: int) -> str:
        return f"{self.while_training}/{step_folder(step)}.json"

    @property
    def given_up(self) -> str:
        """There while nobody measures exports any more."""
        return f"{self.while_training}/GIVEN_UP.json"

    @property
    def result(self) -> str:
        return f"{self.path}/result.json"

    @property
    def report(self) -> str:
        """The page about the run."""
        return f"{self.path}/report.html"

    @property
    def questions(self) -> str:
        return f"{self.path}/questions.jsonl"

    @property
    def samples(self) -> str:
        return f"{self.path}/samples.jsonl"

    @property
    def scores(self) -> str:
        """Folder of the tables of scored rows."""
        return f"{self.path}/scores"

    @property
    def evaluations(self) -> str:
        """Folder of what models were measured on beside the end of the run."""
        return f"{self.path}/evaluations"

    @property
    def scored_rows(self) -> str:
        """What workers that score leave in a folder of their own."""
        return f"{self.path}/rows.jsonl"

    @property
    def tried_losses(self) -> str:
        """What workers that try learning rates leave in a folder of their own."""
        return f"{self.path}/losses.json"

    @property
    def failures(self) -> str:
        return f"{self.path}/failures"

    def tracking(self, tracker: str) -> str:
        """What a tracker has been told of this run."""
        return f"{self.path}/tracking/{tracker}.json"

    def places(self, attempt: int) -> str:
        """The node of each rank of an attempt."""
        return f"{self.path}/places/attempt-{attempt}.json"

    @property
    def logs(self) -> str:
        """Folder of what workers printed."""
        return f"{self.path}/logs"

    def log(self, attempt: int, rank: int) -> str:
        """What a worker printed."""
        return f"{self.logs}/attempt-{attempt}/rank-{rank}.log"

    def older_log(self, attempt: int, rank: int) -> str:
        """What it printed before."""
        return f"{self.logs}/attempt-{attempt}/rank-{rank}.older.log"

    def whereabouts(self, attempt: int) -> str:
        """Where the ranks of an attempt were when one of them was lost."""
        return f"{self.failures}/attempt-{attempt}.whereabouts.json"

    @property
    def downloads(self) -> str:
        return f"{self.path}/downloads"

    @property
    def leases(self) -> str:
        return f"{self.path}/lease"

    @property
    def requests(self) -> str:
        """Folder of what is asked of the run while it goes on; of a sweep too."""
        return f"{self.path}/requests"

    @property
    def save_request(self) -> str:
        """There while the run is asked to save."""
        return f"{self.requests}/save"

    @property
    def stop_request(self) -> str:
        """There while the command that holds the run is asked to end."""
        return f"{self.requests}/stop"

    @property
    def ray(self) -> str:
        """Folder that Ray Train keeps its own files in; nothing of ours depends on it."""
        return f"{self.path}/ray"

    @property
    def placement_groups(self) -> str:
        """A file for each of Ray's placement groups that workers of this run hold, named like it."""
        return f"{self.path}/placement_groups"

    def checkpoint(self, step: int) -> str:
        return f"{self.checkpoints}/{step_folder(step)}"

    def failure(self, attempt: int, rank: int) -> str:
        return f"{self.failures}/attempt-{attempt}.rank-{rank}.json"


@dataclass(frozen=True, slots=True)
class EvaluationFolder:
    """Paths of one evaluation of models, in a run or elsewhere."""

    path: str

    @property
    def identity(self) -> str:
        """Of which models and rows it is; written first."""
        return f"{self.path}/evaluation.json"

    @property
    def result(self) -> str:
        """Written last."""
        return f"{self.path}/result.json"

    @property
    def samples(self) -> str:
        return f"{self.path}/samples.jsonl"

    def chunk(self, fingerprint: str) -> str:
        """What a model answered to rows, by a hash of both."""
        return f"{self.path}/chunks/{fingerprint}.json"


@dataclass(frozen=True, slots=True)
class RatesFolder:
    """Paths of one range test of learning rates below `storage`, beside the run that it is for."""

    storage: str
    name: str

    @property
    def root(self) -> str:
        """Folder of all range tests."""
        return f"{self.storage.rstrip('/')}/rates"

    @property
    def path(self) -> str:
        return f"{self.root}/{self.name}"

    @property
    def rates(self) -> str:
        return f"{self.path}/rates.jsonl"

    @property
    def result(self) -> str:
        return f"{self.path}/result.json"


@dataclass(frozen=True, slots=True)
class FoldsFolder:
    """Paths of one cross-validation below `storage`; it is the `storage` of the folds' run folders."""

    storage: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.storage.rstrip('/')}/{self.name}"

    @property
    def folds(self) -> str:
        return f"{self.path}/folds.json"


@dataclass(frozen=True, slots=True)
class SweepFolder:
    """Paths of one sweep below `storage`, a local folder or an fsspec URL."""

    storage: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.storage.rstrip('/')}/{self.name}"

    @property
    def sweep(self) -> str:
        return f"{self.path}/sweep.json"

    @property
    def ledger(self) -> str:
        return f"{self.path}/ledger.jsonl"

    @property
    def trials(self) -> str:
        """The `storage` of the trials' run folders."""
        return f"{self.path}/trials"

    @property
    def result(self) -> str:
        return f"{self.path}/result.json"

    @property
    def trials_jsonl(self) -> str:
        return f"{self.path}/trials.jsonl"

    @property
    def trials_csv(self) -> str:
        return f"{self.path}/trials.csv"

    @property
    def best(self) -> str:
        return f"{self.path}/best.yaml"

    @property
    def tune(self) -> str:
        return f"{self.path}/tune"

    def stopped(self, command: int) -> str:
        """There once the command of a number is to end: its trials look for it."""
        return f"{self.path}/stopped/command-{command}"

    def trial(self, name: str) -> RunFolder:
        """The run folder of a trial."""
        return RunFolder(self.trials, name)

    def assignment(self, name: str) -> str:
        """Config and plan that a trial is to follow."""
        return f"{self.trial(name).path}/trial.json"
