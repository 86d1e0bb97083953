"""What our agent loops share: a client that begins the first turn with a prefix, and prefixes left for the future."""

import asyncio
import logging
from typing import Any, cast

import torch
from pydantic import Field
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from recipe.soup.names import REQUESTS_KEY, SAMPLED_KEY
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.requests import PrefixRequest, PromptRequests, SampledPrefix
from recipe.soup.verl_adapter.rewards import graded, told
from recipe.soup.verl_adapter.seeding import sample_prefixes
from verl_ext.versioned_client import RUNS_KEY

logger = logging.getLogger(__name__)

REWARD_INFO = "reward_extra_info"
"""Where verl puts what a reward function returned beside the score; absent if there was no reward function to ask."""


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


class TurnClient:
    """An LLM client whose first answer is prefix + continuation, to a caller that knows nothing of prefixes.

    Args:
        client: verl's client.
        prefix: the tokens that the first answer starts with; the engine sees them as the prompt's last tokens.
        response_length: tokens that prefix and continuation may have together.

    Attributes:
        versions: the version that sampled each token of the latest answer.
    """

    def __init__(self, client: LLMServerClient, prefix: Prefix | None, response_length: int) -> None:
        self._client = client
        self._prefix = prefix
        self._response_length = response_length
        self.versions: list[int] = []

    async def generate(self, request_id: str, **kwargs: Any) -> TokenOutput:
        prefix, self._prefix = self._prefix, None
        if prefix is None or not len(prefix):
            output, before = await self._client.generate(request_id, **kwargs), []
        elif prefix.complete:
            output, before = _as_answer(prefix), prefix.versions
        else:
            output, before = await self._continue(prefix, request_id, **kwargs), prefix.versions
        # Runs are there where weights may change in the middle of a response.
        runs = output.extra_fields.pop(RUNS_KEY, None)
        if runs is None:
            runs = [(output.extra_fields["max_global_steps"], len(output.token_ids) - len(before))]
        self.versions = before + [version for version, tokens in runs for _ in range(tokens)]
        return output

    async def _continue(
        self, prefix: Prefix, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
    ) -> TokenOutput:
        token_ids = prefix.token_ids.tolist()
        # verl would count the prefix as prompt, and grant the continuation a full response.
        budget = {"max_tokens": self._response_length - len(token_ids)}
        output = await self._client.generate(
            request_id, prompt_ids=prompt_ids + token_ids, sampling_params={**sampling_params, **budget}, **kwargs
        )
        output.token_ids = token_ids + list(output.token_ids)
        output.log_probs = prefix.log_probs.tolist() + list(output.log_probs or [])
        output.extra_fields["min_global_steps"] = min(prefix.oldest, output.extra_fields["min_global_steps"])
        return output


def _as_answer(prefix: Prefix) -> TokenOutput:
    versions = {
        "global_steps": prefix.newest,
        "min_global_steps": prefix.oldest,
        "max_global_steps": prefix.newest,
    }
    token_ids, log_probs = prefix.token_ids.tolist(), prefix.log_probs.tolist()
    return TokenOutput(token_ids=token_ids, log_probs=log_probs, stop_reason="completed", extra_fields=versions)


class MixedAgentLoop(AgentLoopBase):
    """Stands before one of verl's agent loops, which then runs on a client that knows the sample's prefix.

    Without orders it is verl's loop.

    Attributes:
        turns: the client, while the loop runs.
    """

    turns: TurnClient

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> SoupAgentLoopOutput:
        # Validation rows carry no orders: they are never mixed.
        orders: Any = kwargs.get(REQUESTS_KEY)
        if isinstance(orders, dict):  # of a checkpoint's prompt that is sent out again
            orders = PromptRequests.unpack(orders)
        prefix, seed_orders = orders.take(kwargs["session_id"]) if orders is not None else (None, [])
        late = orders.late.pop(kwargs["session_id"], None) if orders is not None else None
        client = cast(LLMServerClient, self.server_manager)
        # Neither must bring the other down, and no request may outlive the sample, after which the engine may sleep.
        seeding = asyncio.gather(
            *(self._seed(client, order, sampling_params) for order in seed_orders), return_exceptions=True
        )
        seeds: list[SampledPrefix] = []
        try:
            if late is not None:
                seeds += await self._seed(client, late, sampling_params)
                prefix = seeds[0].prefix if seeds else None
            self.turns = TurnClient(client, prefix, int(self.rollout_config.response_length))
            self.server_manager = cast(LLMServerClient, self.turns)
            output: AgentLoopOutput = await super().run(sampling_params, **kwargs)  # pyright: ignore[reportAbstractUsage]  (verl's loop, behind this class)
        finally:
            outcomes = await seeding
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                logger.warning("The prefixes for a later prompt were lost: %r", outcome)
            else:
                seeds += outcome
        fields = {name: getattr(output, name) for name in output.model_fields_set}
        versions = self._versions(output)
        if not len(versions) == len(output.response_ids) == len(output.response_mask):
            raise RuntimeError(f"{len(output.response_ids)} tokens have {len(versions)} versions: a bug of ours.")
        return SoupAgentLoopOutput(**fields, policy_versions=versions, seeds=seeds, tokenizer=self.tokenizer)

    def _versions(self, output: AgentLoopOutput) -> list[int]:
        """The version that sampled each token of the response."""
        raise NotImplementedError

    async def _seed(
        self, client: LLMServerClient, order: PrefixRequest, sampling_params: dict[str, Any]
    ) -> list[SampledPrefix]:
        """Sample a prompt's prefixes with the run's own settings; that of this sample is sampled late."""
        prompt_ids = await self._future_prompt(order)
        return await sample_prefixes(
            client, order, prompt_ids, self._first_turn(sampling_params), int(self.rollout_config.response_length)
        )

    def _cap_text_prompt_length(self, prompt_ids: list[int]) -> list[int]:
        """verl's, which cuts a prompt's beginning off and only logs it; `data.truncation` says whether it may.

        Raises:
            ValueError: the prompt is too long, so its samples are lost.
        """
        longest, truncation = self.rollout_config.prompt_length, self.data_config.get("truncation", "error")
        if len(prompt_ids) > longest and truncation != "left":
            raise ValueError(
                f"a prompt has {len(prompt_ids)} tokens, more than data.max_prompt_length={longest}; raise it, drop "
                "such prompts by data.filter_overlong_prompts=true, or cut their beginnings off by data.truncation=left"
            )
        return super()._cap_text_prompt_length(prompt_ids)

    async def _future_prompt(self, order: PrefixRequest) -> list[int]:
        return await self.ct_build_initial_tokens(list(order.messages))

    def _first_turn(self, sampling_params: dict[str, Any]) -> dict[str, Any]:
        """The sampling parameters of a sample's first turn."""
        return sampling_params
