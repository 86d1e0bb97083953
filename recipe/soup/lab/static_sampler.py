"""Batched sampling for language models: each prompt is read once, and one recorded step is replayed for each token.

`sampler.py` samples for the toy. This one gives tokens of the same distribution, and their log-probs up to rounding:

- samples that begin with the same tokens share what the model computes of them;
- keys and values stand in tensors whose size never changes, so that on a GPU the step that decodes a token is
  recorded as a CUDA graph and replayed: a small model's kernels are over sooner than Python starts the next;
- weights are copied to the type that computes, once for all tokens that are sampled with them.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from recipe.soup.errors import refuse
from recipe.soup.lab.forward import different, padded_left
from recipe.soup.lab.hardware import Hardware
from recipe.soup.lab.sampler import Answer

ROWS = 512
"""Samples at once, at most: so many of SmolLM2-135M with 112 tokens each keep 1.3 GB of keys and values in bfloat16."""
ROWS_STEP, WIDTH_STEP = 64, 32
"""On a GPU, samples and tokens are rounded up to multiples of these, so that few graphs are recorded."""


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


class Decoder:
    """Computes the next token's logits for a fixed number of rows, whose keys and values it holds.

    Args:
        model: on the device, in the type that computes.
        rows: number of samples.
        width: tokens of the longest, at most.
    """

    def __init__(self, model: Any, rows: int, width: int) -> None:
        self._model, self._width = model, width
        device = model.device
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.mask = torch.zeros(rows, 1, 1, width, dtype=torch.bool, device=device)
        self._cache: Any = StaticCache(model.config, max_cache_len=width)
        self._logits: torch.Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def fill(self, cache: Any, which: torch.Tensor, mask: torch.Tensor, length: int) -> None:
        """Take over the keys and values of prompts.

        Args:
            cache: of the different prompts, `length` tokens each, padded on the left.
            which: (rows,), the prompt of each row.
            mask: (prompts, length), 1 where there is no padding.
        """
        for ours, theirs in zip(self._cache.layers, cache.layers, strict=True):
            if not ours.is_initialized:
                ours.lazy_initialization(theirs.keys[which], theirs.values[which])
            ours.keys[:, :, :length] = theirs.keys[which]
            ours.values[:, :, :length] = theirs.values[which]
            ours.cumulative_length.fill_(length)
        self.mask[:] = False
        self.mask[:, 0, 0, :length] = mask[which].bool()
        self.positions[:, 0] = mask[which].sum(dim=1) - 1

    def step(self, chosen: torch.Tensor, column: int) -> torch.Tensor:
        """Logits (rows, vocabulary) of what follows `chosen` (rows, 1), the tokens of this column."""
        self.ids.copy_(chosen)
        self.positions += 1
        self.mask[..., column] = True
        if self.ids.device.type != "cuda":
            return self._forward()
        if self._graph is None:
            self._record(column)
        assert self._graph is not None
        assert self._logits is not None
        self._graph.replay()
        return self._logits

    def _forward(self) -> torch.Tensor:
        # A mask of four dimensions is taken as it is.
        output = self._model(
            input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions, past_key_values=self._cache
        )
        return output.logits[:, -1]

    def _record(self, column: int) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose their kernels at the first calls, which cannot be recorded
            for _ in range(2):
                self._forward()
                self._at(column)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._forward()

    def _at(self, column: int) -> None:
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(column)


class StaticSampler:
    """Samples with the model that is trained, or with past weights of it.

    Args:
        model: the one that is trained; recorded steps are kept for this one only.
        hardware: what to compute on.

    Raises:
        SystemExit: a model with layers that attend to a window only, or have a state instead.
    """

    def __init__(self, model: Any, hardware: Hardware) -> None:
        if any(type(layer) is not StaticLayer for layer in StaticCache(model.config, max_cache_len=1).layers):
            why = "not all of its layers attend to all tokens, which the lab's sampler needs; use main_ppo."
            raise refuse("actor_rollout_ref.model.path", model.config.name_or_path, why)
        self._model, self._hardware = model, hardware
        self._twin = self._copy(model)
        self._decoders: dict[tuple[int, int], Decoder] = {}

    def _copy(self, model: Any) -> Any:
        if self._hardware.dtype == torch.float32:
            return model
        twin = copy.deepcopy(model).requires_grad_(False)
        for parameter in twin.parameters():  # not `.to`, which would round the frequencies of the positions as well
            parameter.data = parameter.data.to(self._hardware.dtype)
        return twin

    def _current(self, model: Any) -> Any:
        if model is not self._model:
            return self._copy(model.to(self._hardware.device))
        if self._twin is not model:
            for ours, theirs in zip(self._twin.parameters(), model.parameters(), strict=True):
                ours.copy_(theirs)
        return self._twin

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        prompts: Sequence[list[int]],
        max_tokens: Sequence[int],
        version: int,
        temperature: float,
        eos_token_id: int,
        generator: torch.Generator,
    ) -> list[Answer]:
        """See `sampler.sample`; the generator is one of the device."""
        current, answers = self._current(model), []
        for start in range(0, len(prompts), ROWS):
            rows = slice(start, start + ROWS)
            tokens, values, lengths = self._sample(
                current, prompts[rows], max_tokens[rows], temperature, eos_token_id, generator
            )
            for ids, probs, length in zip(tokens, values, lengths, strict=True):
                answers.append(Answer(ids[:length], probs[:length], {"global_steps": version}))
        return answers

    def _decoder(self, model: Any, rows: int, width: int) -> Decoder:
        if model is not self._twin or self._hardware.device.type != "cuda":
            return Decoder(model, rows, width)
        if (rows, width) not in self._decoders:
            self._decoders[rows, width] = Decoder(model, rows, width)
        return self._decoders[rows, width]

    def _sample(
        self,
        model: Any,
        prompts: Sequence[list[int]],
        max_tokens: Sequence[int],
        temperature: float,
        eos_token_id: int,
        generator: torch.Generator,
    ) -> tuple[list[list[int]], list[list[float]], list[int]]:
        device, on_gpu = self._hardware.device, self._hardware.device.type == "cuda"
        unique, which = different(prompts)
        ids, mask = (tensor.to(device) for tensor in padded_left(unique, eos_token_id))
        length, limits = ids.size(1), torch.tensor(max_tokens)
        rows, width = len(prompts), length + int(limits.max())
        if on_gpu:
            rows, width = _rounded_up(rows, ROWS_STEP), _rounded_up(width, WIDTH_STEP)
        # Rows that only fill up are samples of nobody: they end at once.
        which = torch.cat([which, which.new_zeros(rows - len(prompts))]).to(device)
        limits = torch.cat([limits, limits.new_zeros(rows - len(prompts))]).to(device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        logits = output.logits[which, -1]
        decoder = self._decoder(model, rows, width)
        decoder.fill(output.past_key_values, which, mask, length)
        del output
        alive, lengths = limits > 0, torch.zeros_like(limits)
        tokens, values = [], []
        for column in range(length, width):
            log_probs = (logits.float() / temperature).log_softmax(dim=-1)
            chosen = torch.multinomial(log_probs.exp(), 1, generator=generator)
            tokens.append(chosen[:, 0])
            values.append(log_probs.gather(1, chosen)[:, 0])
            lengths += alive
            alive &= (chosen[:, 0] != eos_token_id) & (limits > column - length + 1)
            if not alive.any():
                break
            logits = decoder.step(chosen, column)
        kept = slice(0, len(prompts))
        return (
            torch.stack(tokens, dim=1)[kept].tolist(),
            torch.stack(values, dim=1)[kept].tolist(),
            lengths[kept].tolist(),
        )
