"""The trainer's end of snapshots, with a worker group that writes down what it is asked for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from verl_ext.historical_policy import taking
from verl_ext.historical_policy.checkpoint_engine import BACKEND
from verl_ext.historical_policy.taking import take_snapshot, use_snapshots

ROLLOUT = "actor_rollout_ref.rollout"


def test_verls_workers_learn_to_write(composed: Any) -> None:
    config = composed("algorithm=soup", f"{ROLLOUT}.name=vllm")
    use_snapshots(config, Path("/shared"))
    engine = config.actor_rollout_ref.rollout.checkpoint_engine
    assert (engine.backend, engine.engine_kwargs[BACKEND].folder) == (BACKEND, "/shared")


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        ([], "bfloat16"),
        ([f"{ROLLOUT}.dtype=float16"], "float16"),
        (["hardware=cpu"], "float32"),
        ([f"{ROLLOUT}.dtype=auto"], None),
        ([f"{ROLLOUT}.quantization=fp8"], None),  # its scales come from the bits that a cast would round off
        (["actor_rollout_ref.actor.fsdp_config.qat.enable=true"], None),
    ],
)
def test_they_are_written_in_the_rollouts_data_type(composed: Any, overrides: list[str], dtype: str | None) -> None:
    config = composed("algorithm=soup", f"{ROLLOUT}.name=vllm", *overrides)
    use_snapshots(config, None)
    assert config.actor_rollout_ref.rollout.checkpoint_engine.engine_kwargs[BACKEND].dtype == dtype


def test_a_snapshot_is_taken_at_once_and_its_shards_are_asked_for_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taking, "ray", SimpleNamespace(get=lambda answers: answers))
    monkeypatch.setattr(taking, "POLL_SECONDS", 0)
    asked: list[Any] = []
    answers = iter([[None] * 3, [None] * 3, [None, [Path("x")], None]])  # not yet, not yet, done

    def update_weights(**kwargs: Any) -> list[dict]:
        asked.append(kwargs)
        return [{}, {"nbytes": 7}, {}]

    def execute_checkpoint_engine(methods: list[str], version: list[int]) -> list[Any]:
        asked.append((methods, version))
        return next(answers)

    group = SimpleNamespace(
        world_size=3, update_weights=update_weights, execute_checkpoint_engine=execute_checkpoint_engine
    )
    snapshot = take_snapshot(group, version=5)
    assert (snapshot.version, snapshot.nbytes) == (5, 7)
    assert asked == [{"global_steps": 5, "mode": BACKEND}]
    assert list(snapshot.shards) == [Path("x")]
    assert asked[1:] == [(["written"] * 3, [5] * 3)] * 3
    assert list(snapshot.shards) == [Path("x")]
    assert len(asked) == 4
