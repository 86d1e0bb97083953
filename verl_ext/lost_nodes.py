"""Say that Ray has lost a node, where a run's own error only says that one of its processes is gone."""

import re
import time
from collections.abc import Collection

import ray

NODE_DEATH = re.compile(r"Actor(?:Died|Unavailable)\w*Error|\bdied\b")
"""In the cause of a failed run: what a lost node looks like to those that remain."""
WAIT_SECONDS = 30.0
"""Ray gives a node up after about 15 s without a heartbeat."""


def nodes_alive() -> set[str]:
    """Return the ids of the nodes of the Ray that this process is connected to."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def lost_node(cause: str, before: Collection[str], wait: float = WAIT_SECONDS) -> str | None:
    """Return a sentence if a node died, and the run with it; waits until Ray would have noticed.

    Args:
        cause: of the run's failure, in a line.
        before: ids of the nodes that it began with; where there is one, the driver would have died with it.
        wait: seconds.
    """
    if len(before) < 2 or not NODE_DEATH.search(cause):
        return None
    deadline = time.monotonic() + wait
    while True:
        lost = [node for node in ray.nodes() if node["NodeID"] in before and not node["Alive"]]
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
