"""The first error of verl's agent loops, as verl itself logs it."""

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import transfer_queue as tq
import verl.trainer.ppo.v1.agent_loop_tq as agent_loop_tq
from ray.exceptions import ActorDiedError, RayTaskError

from verl_ext import failures
from verl_ext.failures import AGENT_LOOPS, FirstFailure, first_failure, in_a_line


def run_prompt(error: Exception) -> list[str]:
    """verl's own handling of a prompt, both of whose samples fail; returns the statuses that it publishes."""
    statuses: list[str] = []

    async def put(key: str, partition_id: str, tag: dict[str, str]) -> None:
        statuses.append(tag["status"])

    async def run_agent_loop(*args: Any, session_id: int, **kwargs: Any) -> None:
        raise error if session_id == 0 else ValueError("the second one")

    rollout = SimpleNamespace(n=2)
    config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout))
    worker = SimpleNamespace(config=config, _run_agent_loop=run_agent_loop)
    cls: Any = agent_loop_tq.AgentLoopWorkerTQ
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tq, "async_kv_put", put)
        run: Any = cls.__ray_metadata__.modified_class._run_prompt
        asyncio.run(run(worker, {"uid": "u"}, {}, trajectory={"validate": False}))
    return statuses


def test_the_first_error_of_a_failed_sample_is_remembered() -> None:
    handler = FirstFailure()
    logging.getLogger(AGENT_LOOPS).addHandler(handler)
    try:
        assert run_prompt(KeyError("the first one")) == ["running", "failure"]
    finally:
        logging.getLogger(AGENT_LOOPS).removeHandler(handler)
    assert handler.held is not None
    assert handler.held[1] == "KeyError: 'the first one'"


def test_our_agent_loop_brings_the_handler() -> None:
    import recipe.soup.verl_adapter.agent_loop  # noqa: F401

    assert failures._first in logging.getLogger(AGENT_LOOPS).handlers


def test_of_another_process_the_cause_is_told() -> None:
    error = RayTaskError("compute_score", "Traceback ...\nValueError: a grader\n", ValueError("a grader\nand more"))
    assert in_a_line(error.as_instanceof_cause()) == "ValueError: a grader"
    assert in_a_line(ActorDiedError()).startswith("ActorDiedError: The actor died")
    assert in_a_line(TimeoutError()) == "TimeoutError"


def test_the_earliest_error_of_all_workers_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [None, (2.0, "late"), (1.0, "early")]
    agents = [SimpleNamespace(__ray_call__=SimpleNamespace(remote=lambda f, a=answer: a)) for answer in answers]
    monkeypatch.setattr(failures, "ray", SimpleNamespace(get=lambda references, timeout: references))
    assert first_failure(agents) == "early"
    assert first_failure(agents[:1]) is None


def test_a_failure_is_told_once() -> None:
    failures._first.held = (1.0, "early")
    assert failures._take(None) == (1.0, "early")
    assert failures._take(None) is None
