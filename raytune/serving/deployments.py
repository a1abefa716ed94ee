"""An endpoint as Ray Serve runs it: one process that speaks HTTP in front of replicas that hold an engine each.

Two deployments rather than one, for the sake of those who wait: where a replica with an engine dies, which is what memory and
drivers do to processes, the connections are in another one, which asks again or says what happened. That one is single, so that
it alone knows how much is waited for; Serve starts it again where it dies, and adapters loaded at run time are remembered by
the cluster.
"""

from ray import serve

from raytune.serving.front import FrontPlan
from raytune.serving.ingress import Ingress
from raytune.serving.replica import Replica, ReplicaPlan

APP = "raytune"
DRAIN_S = 30.0
"""For answers that are being written when the endpoint ends."""
HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 60.0
"""A replica that computes on all cores of a busy machine is slow to say that it is well."""


def application(
    front: FrontPlan, replica: ReplicaPlan, *, key: str, num_replicas: int, cpus: float, most_per_replica: int
) -> serve.Application:
    """What Serve is to run.

    Args:
        key: under which the cluster remembers adapters.
        cpus: that Ray sets aside for each replica.
        most_per_replica: answers that one holds.
    """
    engines = serve.deployment(
        Replica,
        name="engine",
        num_replicas=num_replicas,
        max_ongoing_requests=most_per_replica,
        ray_actor_options={"num_cpus": cpus, "num_gpus": int(replica.device == "cuda")},
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=DRAIN_S,
        max_constructor_retry_count=2,
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="http",
        max_ongoing_requests=front.most_held + 256,  # who is too many is told so, and does not wait for that
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=DRAIN_S,
    )
    return ingress.bind(front, key, engines.bind(replica))
