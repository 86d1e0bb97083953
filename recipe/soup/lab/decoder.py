"""The step that decodes a token: keys and values in tensors whose size never changes, on a GPU recorded as a graph."""

from typing import Any

import torch
from transformers import StaticCache


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
