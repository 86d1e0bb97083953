"""The second policy with replicas that write down what they are asked for. The real ones: recipe/soup/real_path."""

from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
from omegaconf import DictConfig, OmegaConf
from verl.workers.rollout.replica import TokenOutput

from verl_ext.historical_policy import policy as module
from verl_ext.historical_policy.policy import HistoricalPolicy
from verl_ext.historical_policy.snapshots import PendingShards, Snapshot

MESSAGES = [{"role": "user", "content": "3 5 7=22:"}]


class Replica:
    """One rollout replica; `events` is shared by all."""

    events: ClassVar[list[Any]] = []
    fails: str | None = None

    configs: ClassVar[list[DictConfig]] = []

    def __init__(self, replica_rank: int, config: DictConfig, **_: Any) -> None:
        self.configs.append(config)
        self.rank, self.workers = replica_rank, [f"worker {replica_rank}"]
        self.server_handle = SimpleNamespace(generate=SimpleNamespace(remote=self._generate))

    async def init_standalone(self) -> None:
        self.events.append("standalone")

    async def init_colocated(self, pool: str) -> None:
        self.events.append(("colocated", pool))

    async def sleep(self) -> None:
        self.events.append("sleep")

    async def wake_up(self) -> None:
        self.events.append("wake")

    async def _generate(self, prompt_ids: list[int], sampling_params: dict, request_id: str) -> TokenOutput:
        if self.fails == "generate" or (self.fails == "first" and len(prompt_ids) == 1):
            raise RuntimeError("no answer")
        self.events.append(("generate", self.rank, len(prompt_ids), sampling_params["max_tokens"]))
        assert (sampling_params["temperature"], sampling_params["logprobs"]) == (0.7, True)
        return TokenOutput(token_ids=[5], log_probs=[-1.0], extra_fields={"global_steps": 3})


class Group:
    """verl's worker group over the replicas' weight receivers."""

    def __init__(self, worker_handles: list[str], **_: Any) -> None:
        assert worker_handles == ["worker 2", "worker 3"]

    def execute_checkpoint_engine(self, methods: list[str], **_: Any) -> list[Any]:
        return [self._done(("engine", method)) for method in methods[:1]]

    def update_weights(self, global_steps: int) -> list[Any]:
        return [self._done(("load", global_steps))]

    async def _done(self, event: Any) -> None:
        if Replica.fails == event[0]:
            raise RuntimeError("no room")
        Replica.events.append(event)


@pytest.fixture
def config(composed: Any, monkeypatch: pytest.MonkeyPatch) -> DictConfig:
    monkeypatch.setattr(module, "get_rollout_replica_class", lambda name: Replica)
    monkeypatch.setattr(module, "RayWorkerGroup", Group)
    monkeypatch.setattr(module, "split_resource_pool", lambda pool, size: [f"{pool} {i}" for i in range(2)])
    monkeypatch.setattr(Replica, "events", [])
    monkeypatch.setattr(Replica, "configs", [])
    monkeypatch.setattr(Replica, "fails", None)
    free = "actor_rollout_ref.rollout.free_cache_engine=true"
    return composed("hardware=cpu", "example=countdown", "actor_rollout_ref.rollout.temperature=0.7", free)


def start(config: DictConfig, placement: str) -> HistoricalPolicy:
    pool: Any = "pool" if placement == "colocated" else None
    policy = HistoricalPolicy(config, first_rank=2, placement=placement, n_gpus=2, pool=pool)
    policy.start()
    return policy


@pytest.mark.parametrize("placement", ["colocated", "standalone"])
def test_weights_are_loaded_once_and_a_colocated_engine_is_awake_only_while_it_works(
    config: DictConfig, placement: str
) -> None:
    policy, snapshot = start(config, placement), Snapshot(3, (), 1)
    answers = policy.sample(snapshot, [MESSAGES, MESSAGES, MESSAGES], [4, 5, 6]).result()
    assert [answer and answer.extra_fields["global_steps"] for answer in answers] == [3, 3, 3]
    policy.sample(snapshot, [MESSAGES], [4]).result()
    load = [("engine", "point_at"), ("load", 3), ("engine", "finalize")]
    both = {(2, 4), (3, 5), (2, 6)}  # in turn
    events = Replica.events
    if placement == "colocated":
        assert events[:6] == [("colocated", "pool 0"), ("colocated", "pool 1"), "sleep", "sleep", "wake", "wake"]
        assert events[6:9] == load
        assert events[12:] == ["sleep", "sleep", "wake", "wake", events[-3], "sleep", "sleep"]
        generated = events[9:12]
    else:
        assert events[:5] == ["standalone", "standalone", *load]
        generated = events[5:8]
        assert len(events) == 9
    assert {(rank, tokens) for _, rank, _, tokens in generated} == both
    assert {length for _, _, length, _ in generated} == {9}  # tokens of the prompt


@pytest.mark.parametrize("fails", ["load", "engine", "generate"])
def test_whatever_fails_the_engine_goes_back_to_sleep(
    config: DictConfig, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = start(config, "colocated")
    monkeypatch.setattr(Replica, "fails", fails)
    with pytest.raises(RuntimeError):
        policy.sample(Snapshot(3, (), 1), [MESSAGES], [4]).result()
    assert Replica.events[-2:] == ["sleep", "sleep"]
    monkeypatch.setattr(Replica, "fails", None)
    Replica.events.clear()
    assert policy.sample(Snapshot(3, (), 1), [MESSAGES], [4]).result()
    assert (("load", 3) in Replica.events) == (fails != "generate")  # what was not loaded is loaded again


@pytest.mark.parametrize("fails", [True, False])
def test_the_engine_sleeps_until_the_snapshot_is_written(config: DictConfig, fails: bool) -> None:
    policy = start(config, "colocated")
    Replica.events.clear()

    def wait() -> list[Any]:
        Replica.events.append("written")
        if fails:
            raise RuntimeError("no room")
        return []

    snapshot = Snapshot(3, PendingShards(wait), 1)
    sampling = policy.sample(snapshot, [MESSAGES], [4])
    if fails:
        with pytest.raises(RuntimeError, match="no room"):
            sampling.result()
        assert Replica.events == ["written"]
        return
    sampling.result()
    policy.sample(snapshot, [MESSAGES], [4]).result()
    assert Replica.events[:3] == ["written", "wake", "wake"]
    assert Replica.events.count(("load", 3)) == 1
    assert Replica.events.count("written") == 1


def test_its_engine_may_be_smaller_than_the_current_policys(config: DictConfig) -> None:
    overrides = {"gpu_memory_utilization": 0.25, "max_num_seqs": 7}
    HistoricalPolicy(config, first_rank=2, n_gpus=1, overrides=overrides)
    (engine,), rollout = Replica.configs, config.actor_rollout_ref.rollout
    assert (engine.gpu_memory_utilization, engine.max_num_seqs) == (0.25, 7)
    assert (rollout.gpu_memory_utilization, rollout.max_num_seqs) != (0.25, 7)
    # In its place in the whole config, for interpolations.
    resolved, expected = (cast(dict, OmegaConf.to_container(node, resolve=True)) for node in (engine, rollout))
    assert resolved == {**expected, **overrides}


def test_one_request_that_fails_takes_no_other_with_it(config: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = start(config, "standalone")
    monkeypatch.setattr(Replica, "fails", "first")
    short = [{"role": "user", "content": "3"}]
    answers = policy.sample(Snapshot(3, (), 1), [short, MESSAGES], [4, 4]).result()
    assert [answer is None for answer in answers] == [True, False]
