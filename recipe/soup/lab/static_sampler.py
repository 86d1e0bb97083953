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
from recipe.soup.lab.decoder import Decoder
from recipe.soup.lab.forward import different, last_column, padded_left
from recipe.soup.lab.grouped_attention import use_grouped_attention
from recipe.soup.lab.hardware import Hardware
from recipe.soup.lab.sampler import Answer

ROWS = 512
"""Samples at once, at most: so many of SmolLM2-135M with 112 tokens each keep 1.3 GB of keys and values in bfloat16."""
ROWS_STEP, WIDTH_STEP = 64, 32
"""On a GPU, samples and tokens are rounded up to multiples of these, so that few graphs are recorded."""


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


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
        use_grouped_attention(model)
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
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=last_column(ids)
        )
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
