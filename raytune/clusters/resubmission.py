"""A submitted run outlives the node of its own process: when that is lost, the same is submitted again and goes on."""

import time
from collections.abc import Callable

from raytune.clusters.job import Job
from raytune.clusters.jobs import Jobs
from raytune.clusters.submission import Submission
from raytune.errors import EXIT_RETRY_LATER
from raytune.launch.attempts.lease import EXPIRES_S
from raytune.units import format_seconds

MOST_RESUBMISSIONS = 3
PAUSE_S = EXPIRES_S + 15.0
"""Until a lost process no longer counts as the one at work on the run, and the cluster has noticed that its node is gone."""


def follow_to_the_end(
    jobs: Jobs,
    job: Job,
    submission: Submission,
    write: Callable[[str], None],
    say: Callable[[str], None],
    *,
    started: Callable[[str], None] = lambda name: None,
    most: int = MOST_RESUBMISSIONS,
    pause_s: float = PAUSE_S,
) -> Job:
    """Follow a job until its run has come to an end, under new jobs where one loses the node of its process.

    What failed for a reason of its own is not repeated, nor is what somebody stopped.

    Args:
        started: takes the name of each further job.
        most: how often it is submitted again.
        pause_s: before each time.

    Returns:
        The last job, ended.

    Raises:
        ClusterError: if the dashboard stays silent.
    """
    done, again = jobs.follow(job.id, write, say=say), 0
    while again < most and _goes_on_elsewhere(done, is_repeated=again > 0):
        again += 1
        name = f"{submission.id}-{again + 1}"
        why = f" ({' '.join(done.message.split()).partition('. ')[0]})" if done.message else ""
        say(
            f"job {done.id} lost the node of its process{why}. The run goes on from its newest checkpoint as job {name} in "
            f"{format_seconds(pause_s)}, {again} of at most {most} times"
        )
        time.sleep(pause_s)
        jobs.start(submission, name)
        started(name)
        done = jobs.follow(name, write, say=say)
    return done


def _goes_on_elsewhere(job: Job, *, is_repeated: bool) -> bool:
    """A repeated one may also come too early, while what was lost still counts as being at work on the run."""
    return job.lost_its_driver or (is_repeated and job.exit_code == EXIT_RETRY_LATER)
