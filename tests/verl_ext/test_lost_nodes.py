"""What a lost Ray node makes of a run's last words; against two real nodes: real_path/test_two_nodes.py."""

from types import SimpleNamespace

import pytest

from verl_ext import lost_nodes
from verl_ext.lost_nodes import Cluster, lost_node, this_cluster

ADDRESS = "10.0.0.0:6379"
CAUSES = (
    "ActorUnavailableError: The actor a23 is unavailable: The actor is temporarily unavailable: Socket closed",
    "ActorDiedError: The actor died unexpectedly before finishing this task. class_name: WorkerDict",
    "The vLLM engine of rollout replica 1 died; its own error stands further up in the log. The run was ended.",
)


class Ray:
    """Of some nodes, of which one is noticed to be dead after some questions."""

    def __init__(self, ids: list[str], dead: str | None, after: int = 0, connected: bool = True) -> None:
        self.ids, self.dead, self.left, self.connected = ids, dead, after, connected

    def is_initialized(self) -> bool:
        return self.connected

    def init(self, address: str, **_: object) -> None:
        assert address == ADDRESS
        self.connected = True

    def get_runtime_context(self) -> SimpleNamespace:
        return SimpleNamespace(gcs_address=ADDRESS)

    def nodes(self) -> list[dict]:
        assert self.connected
        self.left -= 1
        return [
            {"NodeID": id, "NodeManagerAddress": f"10.0.0.{i}", "Alive": id != self.dead or self.left >= 0}
            for i, id in enumerate(self.ids)
        ]


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_nodes.time, "sleep", lambda _: None)


@pytest.mark.parametrize("cause", CAUSES)
def test_the_lost_node_is_named_once_ray_has_noticed(cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_nodes, "ray", Ray(["aaaaaaaaaa", "bbbbbbbbbb"], "bbbbbbbbbb", after=3))
    before = this_cluster()
    assert before == Cluster(ADDRESS, frozenset({"aaaaaaaaaa", "bbbbbbbbbb"}))
    said = lost_node(cause, before)
    assert said is not None
    assert "Ray lost the node 10.0.0.1 (bbbbbbbb)" in said


@pytest.mark.parametrize(
    ("ids", "dead", "cause"),
    [
        (["a", "b"], None, CAUSES[0]),  # a process died, and no node
        (["a"], "a", CAUSES[0]),  # a Ray of the run's own
        (["a", "b"], "b", "ValueError: the reward raised"),
    ],
)
def test_no_node_is_blamed_for_what_it_did_not_do(
    ids: list[str], dead: str | None, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_nodes, "ray", Ray(ids, dead))
    assert lost_node(cause, Cluster(ADDRESS, frozenset(ids)), wait=0.01) is None


def test_a_node_that_was_dead_before_the_run_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_nodes, "ray", Ray(["a", "b", "c"], "c"))
    assert lost_node(CAUSES[0], Cluster(ADDRESS, frozenset("ab")), wait=0.01) is None


def test_a_console_that_has_left_ray_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_nodes, "ray", Ray(["a", "b"], "b", connected=False))
    said = lost_node(CAUSES[0], Cluster(ADDRESS, frozenset("ab")))
    assert said is not None
    assert "Ray lost the node 10.0.0.1 (b)" in said
