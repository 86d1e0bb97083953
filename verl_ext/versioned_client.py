"""verl's client for partial rollouts, which also records which version of the weights sampled which tokens.

When verl syncs weights in the middle of a response, its `FullyAsyncLLMServerClient` asks again with the tokens so far
and joins the answers. It keeps only the first and the last of the versions.
"""

from contextvars import ContextVar
from typing import Any

from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient
from verl.workers.rollout.replica import TokenOutput

RUNS_KEY = "policy_runs"
"""Key in `extra_fields`: (version, number of tokens) of each run of tokens that one version sampled, in order."""

_runs: ContextVar[list[tuple[int, int]]] = ContextVar("runs of the response that is being generated")


class _OneAttempt(LLMServerClient):
    """The client that `FullyAsyncLLMServerClient` calls for each attempt; notes version and length of each answer."""

    async def generate(self, *args: Any, **kwargs: Any) -> TokenOutput:
        output = await super().generate(*args, **kwargs)
        if output.token_ids:
            _runs.get().append((output.extra_fields["global_steps"], len(output.token_ids)))
        return output


class VersionedLLMServerClient(FullyAsyncLLMServerClient, _OneAttempt):
    """Adds `extra_fields["policy_runs"]` to every answer: which version sampled which of its tokens."""

    async def generate(self, *args: Any, **kwargs: Any) -> TokenOutput:
        _runs.set([])  # a context variable: every task has its own
        output = await super().generate(*args, **kwargs)
        output.extra_fields[RUNS_KEY] = _runs.get()
        return output
