"""The application put together: one front, and replicas behind it."""

from typing import Any

from memdlm.errors import MachineError
from memdlm.serving.ray_app.options import parsed

try:
    from ray import serve
    from ray.serve import Application
except ImportError as error:
    raise MachineError("serving on Ray needs ray: pip install 'memdlm[ray]'.") from error

from memdlm.serving.ray_app.front import Front
from memdlm.serving.ray_app.replica import Replica


def app(args: dict[str, Any]) -> Application:
    """Return the application; `args` are the flags of `memdlm serve`, and those of `RayOptions`.

        serve.run(app({"model": MODEL, "memories": "s3://bucket/memories", "replicas": 4, "gpus": 1}))

    Raises ConfigError for options that are not known or not possible, before Ray starts anything.
    """
    options, config, memory = parsed(args)
    replicas = serve.deployment(Replica).options(
        name="replica",
        num_replicas=options.replicas,
        max_ongoing_requests=options.at_once,
        max_queued_requests=options.queue,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        graceful_shutdown_timeout_s=2 * options.drain_seconds + 10,
        health_check_timeout_s=60,
    )
    # One front: it follows the jobs. It computes nothing, so no CPU is set aside for it.
    front = serve.deployment(serve.ingress()(Front)).options(
        name="front",
        num_replicas=1,
        max_ongoing_requests=4 * options.replicas * options.at_once + options.queue,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=2 * options.drain_seconds + 10,
    )
    return front.bind(options, replicas.bind(options, config, memory))
