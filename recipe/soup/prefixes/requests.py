"""Requests that ride on a training prompt, and the prefixes that its samples bring back for later prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from recipe.soup.prefixes.prefix import Prefix
from verl_ext.historical_policy.snapshots import Adapter


@dataclass(frozen=True)
class PromptWithTools:
    """A prompt that may call some of the run's tools only.

    Attributes:
        messages: its chat messages, as in verl's `raw_prompt`.
        tools: their names, as in verl's `extra_info.tool_selection`; at least one.
    """

    messages: Any
    tools: tuple[str, ...]


@dataclass(frozen=True)
class PrefixRequest:
    """A request to sample prefixes now for a prompt that is trained on later.

    Attributes:
        ordinal: the future prompt's place in the order of training.
        messages: its chat messages, as in verl's `raw_prompt`.
        lengths: length of the prefix in tokens, by slot.
        on_eos: what to do with a prefix that ends its response: `keep` or `cut`.
        candidates: how many prefixes to sample for each slot; the one with the largest mean of -log_probs is kept.
        with_prompt: whether the prefixes shall come back with the prompt's token ids.
        tools: names of those that the prompt may call; none: all of the run's. They are part of what the model is told.
        adapter: the past version that samples them; None: the current one.
    """

    ordinal: int
    messages: Any
    lengths: dict[int, int]
    on_eos: str
    candidates: int = 1
    with_prompt: bool = False
    tools: tuple[str, ...] = ()
    adapter: Adapter | None = None

    @classmethod
    def unpack(cls, packed: dict[str, Any]) -> "PrefixRequest":
        """Restore what TransferQueue makes a dictionary of."""
        lengths = {int(slot): int(length) for slot, length in packed["lengths"].items()}
        return cls(**{**packed, "lengths": lengths, "tools": tuple(packed["tools"])})


@dataclass
class PromptRequests:
    """What rides on a training prompt; each of the prompt's samples takes its own part out.

    verl stores whatever rides on a prompt again with each of its samples. All samples start before the first of them is
    stored, so nothing is left in here by then.

    Attributes:
        prefixes: the prefix to continue, by sample.
        requests: prefixes to sample for later prompts, by the sample that hosts the requests.
        late: the prefix to sample now, and then to continue, by sample.
    """

    prefixes: dict[int, Prefix] = field(default_factory=dict)
    requests: dict[int, list[PrefixRequest]] = field(default_factory=dict)
    late: dict[int, PrefixRequest] = field(default_factory=dict)

    def take(self, sample: int) -> tuple[Prefix | None, list[PrefixRequest]]:
        """Remove and return one sample's prefix and requests."""
        return self.prefixes.pop(sample, None), self.requests.pop(sample, [])

    @classmethod
    def unpack(cls, packed: dict[str, Any]) -> "PromptRequests":
        """Restore what TransferQueue makes a dictionary of: what rides on a prompt of a checkpoint, sent out again."""
        requests = {int(sample): list(map(PrefixRequest.unpack, asked)) for sample, asked in packed["requests"].items()}
        return cls({int(sample): Prefix.unpack(prefix) for sample, prefix in packed["prefixes"].items()}, requests)


@dataclass(frozen=True)
class SampledPrefix:
    """A prefix that was sampled for a later prompt.

    Attributes:
        ordinal: the prompt's place in the order of training.
        slot: which of the prompt's samples gets the prefix.
        sampled: how many tokens the engine sampled for it.
        ended: whether the engine stopped by itself.
        answers: how many of the engine's answers it was chosen from.
        prompt_ids: the prompt's token ids, if they were asked for.
    """

    ordinal: int
    slot: int
    prefix: Prefix
    sampled: int
    ended: bool
    answers: int = 1
    prompt_ids: list[int] | None = None

    @classmethod
    def from_answers(
        cls, request: PrefixRequest, slot: int, length: int, answers: Sequence[Any], prompt_ids: list[int] | None = None
    ) -> "SampledPrefix":
        """Cut the prefix out of what the engine sampled; of several candidates, take the most surprising one.

        Args:
            answers: verl's TokenOutput of each candidate that arrived, at least one. `extra_fields["global_steps"]` is
                the version of the weights; `extra_fields["policy_runs"]`, if it is there, has a version for each span.
        """
        prefixes = [_prefix(answer, length, request.on_eos) for answer in answers]
        chosen = max(range(len(prefixes)), key=lambda i: prefixes[i].surprise)
        sampled = sum(len(answer.token_ids) for answer in answers)
        ended = len(answers[chosen].token_ids) <= length
        return cls(request.ordinal, slot, prefixes[chosen], sampled, ended, len(answers), prompt_ids)

    def pack(self) -> dict[str, Any]:
        """Return a plain dictionary: TransferQueue does not return other objects as what they were."""
        return {**vars(self), "prefix": self.prefix.pack()}

    @classmethod
    def unpack(cls, packed: dict[str, Any]) -> "SampledPrefix":
        """Undo `pack`."""
        return cls(**{**packed, "prefix": Prefix.unpack(packed["prefix"])})


def _prefix(answer: Any, length: int, on_eos: str) -> Prefix:
    ids, log_probs = list(answer.token_ids), list(answer.log_probs or [])
    spans = answer.extra_fields.get("policy_runs") or [(answer.extra_fields["global_steps"], len(ids))]
    return Prefix.from_sampled(ids, log_probs, spans, length, on_eos)
