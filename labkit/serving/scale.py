"""OpenAI's API on many engines, on this machine or on a Ray cluster: `python -m labkit.scale`.

Needs Ray: `pip install 'labkit[scale]'`. `ray_replica` says what Ray does. It is a module of its own because
the replicas import it, and they cannot import the module that was started as a program.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from labkit.serving import cli

if TYPE_CHECKING:
    from labkit.serving.ray_replica import Replicas

_APP = "labkit"
_STORE_BYTES = 100 * 2**20  # of shared memory: little, because answers are small


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, not {text!r}")
    return value


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The options of this program, and those of `labkit.server`.

    A wrong one ends the program with status 2 and one line on stderr.
    """
    parser = cli.Parser(
        prog="labkit.scale",
        description="OpenAI's API on many engines. Takes the options of labkit.server, too, which say what "
        "each of the engines is and what it allows.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--replicas", type=cli.positive, default=1, help="number of engines (default: %(default)s)")
    add("--max-replicas", type=cli.positive, help="number of engines under load (default: as --replicas)")
    add(
        "--target-ongoing",
        type=cli.positive,
        help="calls to each engine, on average, above which one is added (default: as --max-num-seqs)",
    )
    add("--threads", type=cli.positive, help="cores of each engine (default: an even share)")
    add("--gpus-per-replica", type=_share, help="share of a GPU, 0 to 1 (default: 1 where there are GPUs)")
    add(
        "--routing",
        choices=("load", "session"),
        default="load",
        help="session: calls with the same X-Session-Id go to the same engine (default: %(default)s)",
    )
    add("--address", help='address of a Ray cluster; "auto" for the one that runs here (default: start one)')
    own, rest = parser.parse_known_args(arguments)
    own.max_replicas = own.max_replicas or own.replicas
    if own.max_replicas < own.replicas:
        parser.error(f"--max-replicas must be at least --replicas ({own.replicas}), not {own.max_replicas}")

    from labkit.serving import server  # here, because it takes seconds

    given = server.parse(rest)
    if own.gpus_per_replica and own.gpus_per_replica < 1 and given.num_blocks is None:
        parser.error("engines that share a GPU must be told what each takes of it: --num-blocks")
    return own, given


def shares(own: argparse.Namespace, given: argparse.Namespace, there: Mapping[str, float]) -> Replicas:
    """What each engine gets of a cluster's resources.

    Raises:
        cli.StartError: if the resources do not suffice, and the cluster is not one that may grow.
    """
    from labkit.serving.ray_replica import Replicas

    most = own.max_replicas
    cores, gpus = there.get("CPU", 0), there.get("GPU", 0)
    threads = own.threads or max(1, int(cores // most))
    share = min(gpus, 1) if own.gpus_per_replica is None else own.gpus_per_replica
    for what, each, have in (("cores", threads, cores), ("GPUs", share, gpus)):
        if not own.address and most * each > have:
            raise cli.StartError(
                f"{most} engines with {each:g} {what} each need {most * each:g} {what}, and {have:g} are here"
            )
    return Replicas(
        fewest=own.replicas,
        most=most,
        busy=own.target_ongoing or given.max_num_seqs,
        threads=threads,
        gpus=share,
        ongoing=2 * given.max_num_seqs,  # some wait for a seat where the scheduler sees them
        queued=given.max_queue,
        drain_seconds=given.drain_seconds,
        routing=own.routing,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns the exit status."""
    own, given = parse(arguments)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported
    try:
        import ray
        from ray import serve
    except ImportError:
        print("labkit.scale: Ray is not installed: pip install 'labkit[scale]'", file=sys.stderr)
        return 2
    try:
        cli.check_address(given.host, given.port)
        from labkit.serving.ray_replica import application  # after the check, because it takes seconds

        own_cluster = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
        try:
            ray.init(own.address, **({} if own.address else own_cluster))
        except Exception as error:  # a bare Exception, when its processes take over half a minute
            raise cli.StartError(f"Ray does not start: {error}") from None
        replicas = shares(own, given, ray.cluster_resources())
        print(f"Starting {replicas.fewest} x {given.model} ...", flush=True)
        serve.start(proxy_location="EveryNode", http_options={"host": given.host, "port": given.port})
        try:
            serve.run(application(given, replicas), name=_APP, route_prefix="/")
        except RuntimeError:
            raise cli.StartError("the engines do not start; what they said is above") from None
        print(f"Ready: http://{given.host}:{given.port}/v1", flush=True)
        _wait()
        print("Draining ...", flush=True)
        serve.delete(_APP)  # returns once the answers are finished; other applications go on
    except cli.StartError as error:
        print(f"labkit.scale: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        ray.shutdown()
    return 0


def _wait() -> None:
    """Wait until SIGTERM or Ctrl-C."""
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    told.wait()
