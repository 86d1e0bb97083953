"""Past weights of the lab's model, for `source=snapshot`."""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from recipe.soup.lab.sampler import Answer
from verl_ext.historical_policy.snapshots import Snapshot

Sampling = Callable[[Any, Sequence[Any], Sequence[int], int], list[Answer]]
"""From model, chat messages, tokens to sample and version to answers."""


class PastWeights:
    """Keeps weights as files, for as long as the source keeps their snapshot.

    Args:
        model: the one that is trained.
        sample: samples from a model.
        folder: of the files.
    """

    def __init__(self, model: Any, sample: Sampling, folder: Path) -> None:
        self._model, self._sample, self._folder = model, sample, folder
        self._past: Any = None

    def take_snapshot(self, version: int) -> Snapshot:
        # Copies: tied weights share their memory, which the format does not allow.
        weights = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        path = self._folder / f"version_{version}" / "00000.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a checkpoint may hold a link to an older file of this name
        save_file(weights, path)
        return Snapshot(version, (path,), path.stat().st_size)

    def sample(self, snapshot: Snapshot, prompts: Sequence[Any], max_tokens: Sequence[int]) -> "Future[list[Any]]":
        if snapshot.origin is not None:
            past = AutoModelForCausalLM.from_pretrained(snapshot.origin, dtype=torch.float32)
        else:
            past = self._past = self._past or copy.deepcopy(self._model)
            [file] = snapshot.shards
            past.load_state_dict(load_file(str(file)))
        future: Future[list[Any]] = Future()
        future.set_result(self._sample(past, prompts, max_tokens, snapshot.version))
        return future
