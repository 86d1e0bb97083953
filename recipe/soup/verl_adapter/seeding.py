"""How an agent loop samples prefixes: for a later prompt, beside a sample of its own, or for this very sample."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from recipe.soup.prefixes.prefix import tokens_to_ask_for
from recipe.soup.prefixes.requests import PrefixRequest, SampledPrefix
from verl_ext.versioned_client import VersionedLLMServerClient

logger = logging.getLogger(__name__)


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


async def sample_prefixes(
    client: LLMServerClient,
    order: PrefixRequest,
    prompt_ids: list[int],
    sampling_params: dict[str, Any],
    response_length: int,
) -> list[SampledPrefix]:
    """Sample the first tokens of a prompt's responses, with today's weights or those of the order's adapter.

    Args:
        prompt_ids: the prompt, as its own agent loop will build it.
        sampling_params: as its own agent loop will give them.
        response_length: tokens that a response may have.
    """
    past = {} if order.adapter is None else {"adapter": order.adapter}
    async with _requests(client, prompt_ids, sampling_params) as request:

        async def sample(slot: int, length: int) -> SampledPrefix | None:
            params = {**sampling_params, "max_tokens": tokens_to_ask_for(length, response_length)}
            outcomes = await asyncio.gather(
                *(request(prompt_ids=prompt_ids, sampling_params=params, **past) for _ in range(order.candidates)),
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
