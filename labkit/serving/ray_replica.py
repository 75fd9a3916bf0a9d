"""Many engines behind one address, by Ray Serve; `python -m labkit.scale` is the program.

A replica is one engine and its API in a process of its own, on any machine of a Ray cluster on which labkit
is installed. Ray does the rest: it starts the replicas, spreads the calls, streams the answers through its
proxy, replaces a replica whose engine has failed, follows the load, and lets a replica finish before it ends.

A call goes to the less busy of two replicas drawn at random. With `routing="session"`, all calls with the
same `X-Session-Id` header go to one replica, whose prefix cache then knows the conversation
(`ConsistentHashRouter`). Ray's `PrefixCacheAffinityRouter` cannot be used here: it looks for the prompt in
the arguments of a call from one deployment to another, but the proxy hands bytes to a deployment with routes.

Each replica counts for itself: `/metrics` and `/health` answer for the replica that is asked, and the limits
hold for each replica.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from labkit.serving import cli
from labkit.serving.async_engine import EngineStoppedError
from labkit.serving.guard import Guard
from labkit.serving.routes import create_app
from labkit.serving.server import guarded, options_of

if TYPE_CHECKING:
    from fastapi import FastAPI

_SESSION_ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"


@dataclass(frozen=True)
class Replicas:
    """The number of replicas, and what each has.

    Args:
        fewest: the number of replicas at the start, and at least.
        most: the number of replicas under load, at most.
        busy: the number of calls under way in a replica above which another replica is added.
        threads: the cores of each replica.
        gpus: the share of a GPU of each replica, 0 to 1; below 1, replicas share one.
        ongoing: the number of calls that a replica takes at once; further ones wait in Ray's queue.
        queued: the number of calls that may wait there; further ones are answered with status 503.
        drain_seconds: the time that answers have to end when their replica is stopped.
        routing: "load" or "session", see above.
    """

    fewest: int = 1
    most: int = 1
    busy: int = 32
    threads: int = 1
    gpus: float = 0.0
    ongoing: int = 64
    queued: int = 1024
    drain_seconds: float = 30.0
    routing: Literal["load", "session"] = "load"


class _Replica:
    """What Ray asks of a replica besides its routes. Ray's wrapper sets `app`."""

    app: FastAPI

    def check_health(self) -> None:
        """Raise if the engine has failed: Ray then replaces this replica by another."""
        live = self.app.state.handler.engine()
        if live.failure is not None:
            raise EngineStoppedError(f"the engine failed: {live.failure}")


def application(given: argparse.Namespace, replicas: Replicas) -> serve.Application:
    """The API on several engines, for `serve.run`.

    Args:
        given: the options of `labkit.server`.
        replicas: the number of engines, and what each has.
    """

    def build() -> FastAPI:  # each replica calls it, in its own process
        import torch

        torch.set_num_threads(replicas.threads)
        app = create_app(cli.load(given, trace_steps=1), options_of(given))
        app.add_middleware(Guard, **guarded(given))
        return app

    many: dict[str, Any] = {"num_replicas": replicas.fewest}
    if replicas.most > replicas.fewest:
        many = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=replicas.fewest,
                max_replicas=replicas.most,
                target_ongoing_requests=replicas.busy,
            )
        }
    if replicas.routing == "session":
        many["request_router_config"] = RequestRouterConfig(request_router_class=_SESSION_ROUTER)
    deployment = serve.deployment(
        serve.ingress(build)(_Replica),
        name="engine",
        ray_actor_options={"num_cpus": replicas.threads, "num_gpus": replicas.gpus},
        max_ongoing_requests=replicas.ongoing,
        max_queued_requests=replicas.queued,
        health_check_period_s=5,
        graceful_shutdown_wait_loop_s=1,
        graceful_shutdown_timeout_s=replicas.drain_seconds,
        **many,
    )
    return deployment.bind()
