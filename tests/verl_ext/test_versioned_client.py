"""The client that tells which version sampled which tokens: verl's own client underneath, a fake server, no Ray."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from verl.workers.rollout import llm_server
from verl.workers.rollout.replica import TokenOutput

from verl_ext.versioned_client import RUNS_KEY, VersionedLLMServerClient

RESPONSE_LENGTH = 12
Attempt = tuple[int, int, str]
"""Version of the weights, tokens, stop reason."""


async def remote(value: Any = None) -> Any:
    """What Ray's `.remote()` gives: something to wait for, during which other tasks go on."""
    await asyncio.sleep(0)
    return value


class Cluster:
    """A load balancer with one server, which answers each prompt by its own list of attempts."""

    def __init__(self, attempts: dict[int, list[Attempt]]) -> None:
        self.attempts = {prompt: list(some) for prompt, some in attempts.items()}
        self.requests: list[SimpleNamespace] = []
        self.in_flight = 0
        methods = {
            "require_acquire_fields": lambda: remote([]),
            "require_release_fields": lambda: remote([]),
            "acquire_server": self._acquire,
        }
        self.handle = SimpleNamespace(**{name: SimpleNamespace(remote=call) for name, call in methods.items()})
        self.handle.release_server = SimpleNamespace(remote=self._release)

    def _acquire(self, **_: Any) -> Any:
        self.in_flight += 1
        return remote(("server", SimpleNamespace(generate=SimpleNamespace(remote=self._generate))))

    def _release(self, **_: Any) -> None:
        self.in_flight -= 1

    async def _generate(self, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> TokenOutput:
        self.requests.append(SimpleNamespace(prompt_ids=list(prompt_ids), params=dict(sampling_params)))
        version, tokens, reason = self.attempts[prompt_ids[0]].pop(0)
        await asyncio.sleep(0)
        return TokenOutput(
            token_ids=[version] * tokens,
            log_probs=[-float(version)] * tokens,
            stop_reason=reason,
            extra_fields={"global_steps": version},
        )

    def client(self) -> VersionedLLMServerClient:
        rollout = SimpleNamespace(name="vllm", response_length=RESPONSE_LENGTH)
        config: Any = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout))
        handle: Any = self.handle
        return VersionedLLMServerClient(config=config, load_balancer_handle=handle)


@pytest.fixture(autouse=True, scope="module")
def without_pauses() -> Any:
    """verl sleeps a second between two attempts; here other tasks have their turn and that is all."""
    patch = pytest.MonkeyPatch()
    patch.setattr(llm_server, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": lambda _: remote()}))
    yield
    patch.undo()


async def ask(client: VersionedLLMServerClient, prompt: int, **params: Any) -> TokenOutput:
    return await client.generate(f"request {prompt}", prompt_ids=[prompt], sampling_params=params)


def test_a_response_that_was_interrupted_twice_reports_its_runs() -> None:
    cluster = Cluster({50: [(3, 2, "aborted"), (4, 5, "abort"), (6, 1, "completed")]})
    output = asyncio.run(ask(cluster.client(), 50))
    assert output.extra_fields[RUNS_KEY] == [(3, 2), (4, 5), (6, 1)]
    assert output.token_ids == [3] * 2 + [4] * 5 + [6]
    assert output.log_probs == [-3.0] * 2 + [-4.0] * 5 + [-6.0]
    assert (output.extra_fields["min_global_steps"], output.extra_fields["max_global_steps"]) == (3, 6)
    assert [request.prompt_ids for request in cluster.requests] == [[50], [50, 3, 3], [50, 3, 3, *[4] * 5]]
    assert [request.params["max_tokens"] for request in cluster.requests] == [12, 10, 5]
    assert cluster.in_flight == 0


def test_a_response_that_was_not_interrupted_is_one_run() -> None:
    output = asyncio.run(ask(Cluster({50: [(7, 4, "completed")]}).client(), 50))
    assert output.extra_fields[RUNS_KEY] == [(7, 4)]


@pytest.mark.parametrize("empty_at", [0, 1, 2])
def test_an_attempt_that_was_aborted_before_its_first_token_is_no_run(empty_at: int) -> None:
    attempts = [(3, 2, "aborted"), (5, 4, "aborted")]
    attempts.insert(empty_at, (4, 0, "aborted"))
    output = asyncio.run(ask(Cluster({50: [*attempts, (6, 1, "completed")]}).client(), 50))
    assert output.extra_fields[RUNS_KEY] == [(3, 2), (5, 4), (6, 1)]


def test_an_interrupted_response_that_has_used_up_its_budget_is_over() -> None:
    cluster = Cluster({50: [(3, 2, "aborted"), (4, 3, "aborted"), (5, 9, "completed")]})
    output = asyncio.run(ask(cluster.client(), 50, max_tokens=5))
    assert output.extra_fields[RUNS_KEY] == [(3, 2), (4, 3)]
    assert output.stop_reason == "length"


def test_one_call_after_another_starts_anew() -> None:
    async def main() -> list[TokenOutput]:
        client = Cluster({50: [(3, 2, "aborted"), (4, 1, "completed")], 60: [(4, 5, "completed")]}).client()
        return [await ask(client, 50), await ask(client, 60)]

    first, second = asyncio.run(main())
    assert first.extra_fields[RUNS_KEY] == [(3, 2), (4, 1)]
    assert second.extra_fields[RUNS_KEY] == [(4, 5)]


def test_calls_in_different_tasks_do_not_mix_their_runs() -> None:
    attempts = {prompt: [(prompt, 1, "aborted"), (prompt + 1, 2, "aborted"), (prompt + 2, 3, "completed")]
                for prompt in (50, 60, 70)}  # fmt: skip

    async def main() -> tuple[Cluster, list[TokenOutput]]:
        cluster = Cluster(attempts)
        client = cluster.client()
        await ask(Cluster({50: [(1, 1, "completed")]}).client(), 50)  # the tasks start with what this left behind
        return cluster, await asyncio.gather(*(ask(client, prompt) for prompt in attempts))

    cluster, outputs = asyncio.run(main())
    order = [request.prompt_ids[0] for request in cluster.requests]
    assert order != sorted(order)  # they did run at the same time
    for prompt, output in zip(attempts, outputs, strict=True):
        assert output.extra_fields[RUNS_KEY] == [(prompt, 1), (prompt + 1, 2), (prompt + 2, 3)]


@given(
    responses=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=4), min_size=1, max_size=4
    )
)
def test_every_token_is_in_one_run_of_its_own_version(responses: list[list[tuple[int, int]]]) -> None:
    attempts = {
        prompt: [*((version, tokens, "aborted") for version, tokens in some), (9, 1, "completed")]
        for prompt, some in enumerate(responses, start=100)
    }

    async def main() -> list[TokenOutput]:
        client = Cluster(attempts).client()
        return await asyncio.gather(*(ask(client, prompt, max_tokens=99) for prompt in attempts))

    for output in asyncio.run(main()):
        runs = output.extra_fields[RUNS_KEY]
        assert [version for version, tokens in runs for _ in range(tokens)] == output.token_ids
        assert all(tokens > 0 for _, tokens in runs)
