"""Log-probs of samples under a model: a plain forward pass for the toy, and one that computes each prompt once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits_v2

from recipe.soup.lab.hardware import Hardware


@dataclass(frozen=True)
class Sample:
    """One response; per-token lists are as long as `response_ids`."""

    prompt_ids: list[int]
    response_ids: list[int]
    versions: list[int]
    log_probs: list[float]
    reward: float
    uid: int


Forward = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""`forward` with its arguments, or `SharedPrompts`."""


def forward(
    model: Any, samples: Sequence[Sample], temperature: float, with_entropy: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropy (nats) of what follows each token.

    Returns:
        log-probs and entropies, both (tokens,), over all tokens of prompts and responses one after another, 0 at each
        sample's last token; without `with_entropy` all entropies are 0.
    """
    sequences = [torch.tensor(sample.prompt_ids + sample.response_ids) for sample in samples]
    ids = pad_sequence(sequences, batch_first=True)
    mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask).logits.float() / temperature
    # Not `logprobs_from_logits`, which wants a GPU wherever flash-attn is installed.
    log_probs = logprobs_from_logits_v2(logits, torch.cat([ids[:, 1:], ids[:, :1]], dim=1))
    places = mask.bool()
    inner = torch.cat([places[:, 1:], torch.zeros_like(places[:, :1])], dim=1)
    entropy = entropy_from_logits(logits) if with_entropy else torch.zeros_like(log_probs)
    return (log_probs * inner)[places], (entropy * inner)[places]


def distributions(model: Any, samples: Sequence[Sample], temperature: float) -> list[torch.Tensor]:
    """Log-probs of all tokens at each place of each response, each (response_length, vocabulary); a toy's only."""
    sequences = [torch.tensor(sample.prompt_ids + sample.response_ids) for sample in samples]
    ids = pad_sequence(sequences, batch_first=True)
    mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask).logits.float() / temperature
    log_probs = logits.log_softmax(dim=-1)
    return [
        row[len(sample.prompt_ids) - 1 : len(sample.prompt_ids) + len(sample.response_ids) - 1].clone()
        for row, sample in zip(log_probs, samples, strict=True)
    ]


def padded_left(rows: Sequence[list[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (rows, width) that all end in the last column, and the mask of those that are no padding."""
    width = max(map(len, rows))
    ids = torch.tensor([[value] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def different(rows: Sequence[list[int]]) -> tuple[list[list[int]], torch.Tensor]:
    """Those rows that differ, in the order in which they first come, and for each row which of them it is."""
    places: dict[tuple[int, ...], int] = {}
    which = [places.setdefault(tuple(row), len(places)) for row in rows]
    return [list(row) for row in places], torch.tensor(which)


def last_column(ids: torch.Tensor) -> torch.Tensor:
    """For `logits_to_keep`: with a number there, torch multiplies a copy of the vocabulary's matrix for each row."""
    return torch.tensor([ids.size(1) - 1], device=ids.device)


class SharedPrompts:
    """Gives what `forward` gives for the tokens of responses, with 0 at those of prompts, which no loss reads.

    A prompt is computed once, and its keys and values serve all samples that begin with it, also backwards. The last
    token of a response is not computed, since nothing follows it, and logits of prompts are not either.
    """

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware

    def __call__(
        self, model: Any, samples: Sequence[Sample], temperature: float, with_entropy: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `forward`; what it returns is on the CPU, whatever computed it."""
        device = self._hardware.device
        prompts, which = different([sample.prompt_ids for sample in samples])
        prompt_ids, prompt_mask = (tensor.to(device) for tensor in padded_left(prompts, 0))
        which = which.to(device)
        responses = [torch.tensor(sample.response_ids) for sample in samples]
        ids = pad_sequence(responses, batch_first=True).to(device)
        mask = pad_sequence([torch.ones_like(row) for row in responses], batch_first=True).to(device)
        with self._hardware.autocast():
            positions = (prompt_mask.cumsum(dim=1) - 1).clamp(min=0)
            output = model(
                input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=positions, use_cache=True,
                logits_to_keep=last_column(prompt_ids),
            )  # fmt: skip
            pieces = [output.logits[which]]  # (samples, 1, vocabulary), of the first token
            if ids.size(1) > 1:
                cache = output.past_key_values
                cache.batch_select_indices(which)
                following = model(
                    input_ids=ids[:, :-1],
                    attention_mask=torch.cat([prompt_mask[which], mask[:, :-1]], dim=1),
                    position_ids=positions[which, -1:] + mask[:, :-1].cumsum(dim=1),
                    past_key_values=cache,
                )
                pieces.append(following.logits)
        log_probs, entropies = [], []
        for logits, labels in zip(pieces, (ids[:, :1], ids[:, 1:]), strict=False):
            scaled = logits.float() if temperature == 1 else logits.float() / temperature
            log_probs.append(logprobs_from_logits_v2(scaled, labels))
            entropies.append(entropy_from_logits(scaled) if with_entropy else torch.zeros_like(log_probs[-1]))
        of_samples, of_entropy = (torch.cat(values, dim=1).cpu() for values in (log_probs, entropies))
        return _in_place(of_samples, samples), _in_place(of_entropy, samples)


def _in_place(values: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
    """Values of responses (samples, width), where `forward` has them."""
    rows = []
    for row, sample in zip(values, samples, strict=True):
        length = len(sample.response_ids)
        rows += [row.new_zeros(len(sample.prompt_ids) - 1), row[:length], row.new_zeros(1)]
    return torch.cat(rows)


def of_responses(values: torch.Tensor, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """Cut what `forward` returns into what belongs to each sample's response."""
    lengths = [len(sample.prompt_ids) + len(sample.response_ids) for sample in samples]
    return [row[len(s.prompt_ids) - 1 : -1] for row, s in zip(values.split(lengths), samples, strict=True)]
