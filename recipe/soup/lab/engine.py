"""Past weights of the lab's model, for `source=snapshot`."""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AutoModelForCausalLM

from recipe.soup.lab.sampler import Answer
from verl_ext.historical_policy.snapshots import Snapshot

Sampling = Callable[[Any, Sequence[Any], Sequence[int], int], list[Answer]]
"""From model, chat messages, tokens to sample and version to answers."""


class PastWeights:
    """Keeps weights for as long as the source keeps their snapshot.

    Args:
        model: the one that is trained.
        sample: samples from a model.
    """

    def __init__(self, model: Any, sample: Sampling) -> None:
        self._model, self._sample = model, sample
        self._past: Any = None
        self._weights: WeakKeyDictionary[Snapshot, dict[str, torch.Tensor]] = WeakKeyDictionary()

    def take_snapshot(self, version: int) -> Snapshot:
        weights = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        snapshot = Snapshot(version, (), sum(tensor.nbytes for tensor in weights.values()))
        self._weights[snapshot] = weights
        return snapshot

    def sample(self, snapshot: Snapshot, prompts: Sequence[Any], max_tokens: Sequence[int]) -> "Future[list[Any]]":
        if snapshot.origin is not None:
            past = AutoModelForCausalLM.from_pretrained(snapshot.origin, dtype=torch.float32)
        else:
            past = self._past = self._past or copy.deepcopy(self._model)
            past.load_state_dict(self._weights[snapshot])
        future: Future[list[Any]] = Future()
        future.set_result(self._sample(past, prompts, max_tokens, snapshot.version))
        return future
