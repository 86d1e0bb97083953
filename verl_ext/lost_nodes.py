"""Say that Ray has lost a node, where a run's own error only says that one of its processes is gone."""

import logging
import re
import time
from dataclasses import dataclass

import ray

NODE_DEATH = re.compile(r"Actor(?:Died|Unavailable)\w*Error|\bdied\b")
"""In the cause of a failed run: what a lost node looks like to those that remain."""
WAIT_SECONDS = 30.0
"""Ray gives a node up after about 15 s without a heartbeat."""


@dataclass(frozen=True)
class Cluster:
    """The Ray that a run began with.

    Attributes:
        address: of its head.
        nodes: ids of its nodes.
    """

    address: str
    nodes: frozenset[str]


def this_cluster() -> Cluster:
    """Return the Ray that this process is connected to."""
    alive = frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])
    return Cluster(ray.get_runtime_context().gcs_address, alive)


def lost_node(cause: str, before: Cluster, wait: float = WAIT_SECONDS) -> str | None:
    """Return a sentence if a node died, and the run with it; waits until Ray would have noticed.

    Args:
        cause: of the run's failure, in a line.
        before: what it began with; where there is one node, the driver would have died with it.
        wait: seconds.
    """
    if len(before.nodes) < 2 or not NODE_DEATH.search(cause):
        return None
    if not ray.is_initialized():  # whoever hides the log has left Ray already, to get the last of it
        ray.init(before.address, log_to_driver=False, logging_level=logging.ERROR)
    deadline = time.monotonic() + wait
    while True:
        lost = [node for node in ray.nodes() if node["NodeID"] in before.nodes and not node["Alive"]]
        if lost or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    if not lost:
        return None
    places = ", ".join(f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})" for node in lost)
    return (
        f"Ray lost the node {places}, and with it processes of this run; when it is back, the same command goes on at "
        "the last checkpoint (trainer.resume_mode=auto)."
    )
