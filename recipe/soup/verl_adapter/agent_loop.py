"""The rollout side: continue a historical prefix token-in token-out, and leave prefixes for the future.

verl imports this module right after its own agent loops, wherever those run.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast
from uuid import uuid4

import torch
from pydantic import Field
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from recipe.soup.names import AGENT_NAME, REQUESTS_KEY, SAMPLED_KEY
from recipe.soup.prefixes.prefix import Prefix, tokens_to_ask_for
from recipe.soup.prefixes.requests import PrefixRequest, PromptRequests, SampledPrefix
from recipe.soup.verl_adapter.rewards import graded, told
from verl_ext.failures import remember_failures
from verl_ext.versioned_client import RUNS_KEY, VersionedLLMServerClient

logger = logging.getLogger(__name__)

REWARD_INFO = "reward_extra_info"
"""Where verl puts what a reward function returned beside the score; absent if there was no reward function to ask."""


class _OnceEach(logging.Filter):
    """Lets each message pass once in a process."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._seen
        self._seen.add(message)
        return new


# verl makes an agent loop for each sample, and warns each time that a model has no prompt builder of its own.
logging.getLogger("verl.utils.tokenizer.continuous_token_wiring").addFilter(_OnceEach())
remember_failures()


class SoupAgentLoopOutput(AgentLoopOutput):
    """verl's output plus the version that sampled each response token.

    The behaviour log-probs are verl's `rollout_log_probs`: each token's, as recorded when it was sampled.
    """

    policy_versions: list[int]
    seeds: list[Any] = Field(default=[], exclude=True)
    tokenizer: Any = Field(default=None, exclude=True)

    def as_dict(self) -> dict[str, Any]:
        """What verl stores of the sample, which has been graded by then unless the trainer grades whole batches.

        Raises:
            ValueError: its reward is not one finite number. verl then drops the sample, as if the reward had raised.
        """
        info = self.extra_fields.get(REWARD_INFO)
        if self.reward_score is not None or info is not None:
            self.reward_score = graded(self.reward_score, self._texts)
            self.extra_fields[REWARD_INFO] = told(info or {})
        output = super().as_dict()
        output["policy_versions"] = torch.tensor(output.pop("policy_versions"), dtype=torch.int64)
        output["extra_fields"][SAMPLED_KEY] = [seed.pack() for seed in self.seeds]
        return output

    def _texts(self) -> tuple[str, str]:
        return self.tokenizer.decode(self.prompt_ids), self.tokenizer.decode(self.response_ids)


class PrefixContinuation:
    """An LLM client that answers with prefix + continuation, to a caller that knows nothing of prefixes.

    Args:
        client: verl's client.
        prefix: the tokens to start from; the engine sees them as the prompt's last tokens.
        response_length: tokens that prefix and continuation may have together.
    """

    def __init__(self, client: LLMServerClient, prefix: Prefix, response_length: int) -> None:
        self._client = client
        self._prefix = prefix
        self._response_length = response_length

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
    ) -> TokenOutput:
        token_ids, log_probs = self._prefix.token_ids.tolist(), self._prefix.log_probs.tolist()
        oldest, newest = self._prefix.oldest, self._prefix.newest
        if self._prefix.complete:
            versions = {"global_steps": newest, "min_global_steps": oldest, "max_global_steps": newest}
            return TokenOutput(token_ids=token_ids, log_probs=log_probs, stop_reason="completed", extra_fields=versions)
        # verl would count the prefix as prompt, and grant the continuation a full response.
        budget = {"max_tokens": self._response_length - len(token_ids)}
        output = await self._client.generate(
            request_id, prompt_ids=prompt_ids + token_ids, sampling_params={**sampling_params, **budget}, **kwargs
        )
        output.token_ids = token_ids + list(output.token_ids)
        output.log_probs = log_probs + list(output.log_probs or [])
        output.extra_fields["min_global_steps"] = min(oldest, output.extra_fields["min_global_steps"])
        return output


@asynccontextmanager
async def _requests(
    client: LLMServerClient, prompt_ids: list[int], sampling_params: dict[str, Any]
) -> AsyncIterator[Callable[..., Awaitable[TokenOutput]]]:
    """A way to send requests with the same prompt.

    All of them go to one server, whose prefix cache then holds the prompt. verl's `client.generate` would ask the load
    balancer for each; on a laptop those calls cost as much as the tokens. But where verl syncs weights while requests
    run, they must go through its client, which continues those that were interrupted.
    """
    if isinstance(client, VersionedLLMServerClient):
        yield lambda **kwargs: client.generate(uuid4().hex, **kwargs)
        return
    request_id = uuid4().hex
    server_id, server = await client._acquire_server(request_id, prompt_ids=prompt_ids, sampling_params=sampling_params)
    try:
        yield lambda **kwargs: server.generate.remote(request_id=uuid4().hex, **kwargs)
    finally:
        client._release_server(server_id, request_id=request_id)


@register(AGENT_NAME)
class SoupAgentLoop(SingleTurnAgentLoop):
    """verl's single-turn loop, on a client that knows the sample's prefix. Without orders it is verl's loop."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> SoupAgentLoopOutput:
        # Validation rows carry no orders: they are never mixed.
        orders: PromptRequests | None = kwargs.get(REQUESTS_KEY)
        prefix, seed_orders = orders.take(kwargs["session_id"]) if orders is not None else (None, [])
        client = cast(LLMServerClient, self.server_manager)
        # Neither must bring the other down, and no request may outlive the sample, after which the engine may sleep.
        seeding = asyncio.gather(
            *(self._seed(client, order, sampling_params) for order in seed_orders), return_exceptions=True
        )
        if prefix is not None and len(prefix):
            continuing = PrefixContinuation(client, prefix, int(self.rollout_config.response_length))
            self.server_manager = cast(LLMServerClient, continuing)
        try:
            output: AgentLoopOutput = await super().run(sampling_params, **kwargs)  # pyright: ignore[reportAbstractUsage]  (decorated, not abstract)
        finally:
            outcomes = await seeding
        seeds: list[SampledPrefix] = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                logger.warning("The prefixes for a later prompt were lost: %r", outcome)
            else:
                seeds += outcome
        return self._extend(output, prefix, seeds)

    def _extend(
        self, output: AgentLoopOutput, prefix: Prefix | None, seeds: list[SampledPrefix]
    ) -> SoupAgentLoopOutput:
        historical = prefix.versions if prefix is not None else []
        current = output.extra_fields["max_global_steps"]
        # Runs are there where weights may change in the middle of a response.
        runs = output.extra_fields.pop(RUNS_KEY, [(current, len(output.response_ids) - len(historical))])
        versions = historical + [version for version, tokens in runs for _ in range(tokens)]
        fields = {name: getattr(output, name) for name in output.model_fields_set}
        return SoupAgentLoopOutput(**fields, policy_versions=versions, seeds=seeds, tokenizer=self.tokenizer)

    async def _seed(
        self, client: LLMServerClient, order: PrefixRequest, sampling_params: dict[str, Any]
    ) -> list[SampledPrefix]:
        """Sample the first tokens of a future prompt's responses, with today's weights and the run's own settings."""
        prompt_ids = await self.ct_build_initial_tokens(list(order.messages))
        async with _requests(client, prompt_ids, sampling_params) as request:

            async def sample(slot: int, length: int) -> SampledPrefix | None:
                tokens = tokens_to_ask_for(length, int(self.rollout_config.response_length))
                params = {**sampling_params, "max_tokens": tokens}
                outcomes = await asyncio.gather(
                    *(request(prompt_ids=prompt_ids, sampling_params=params) for _ in range(order.candidates)),
                    return_exceptions=True,
                )
                for outcome in outcomes:
                    if isinstance(outcome, BaseException):
                        logger.warning("A prefix for a later step was lost: %r", outcome)
                answers = [o for o in outcomes if not isinstance(o, BaseException) and o.stop_reason != "aborted"]
                answers = [answer for answer in answers if answer.token_ids]
                kept_ids = prompt_ids if order.with_prompt else None
                return SampledPrefix.from_answers(order, slot, length, answers, kept_ids) if answers else None

            seeds = await asyncio.gather(*(sample(slot, length) for slot, length in order.lengths.items()))
        return [seed for seed in seeds if seed is not None]
