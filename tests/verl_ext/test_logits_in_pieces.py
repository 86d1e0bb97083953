"""Log-probs and entropies in pieces: verl's own values and gradients to the last bit, with less kept in between."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from verl.utils import torch_functional
from verl.workers.engine.fsdp import transformer_impl

from verl_ext.logits_in_pieces import ON_ACCELERATOR, ON_CPU, pieces_of

FUNCTIONAL: Any = torch_functional
LOG_PROBS, ENTROPY = FUNCTIONAL.logprobs_from_logits_v2, FUNCTIONAL.entropy_from_logits
TYPES = [torch.float32, torch.bfloat16]
VOCABULARY, ROWS = 4096, ON_CPU // 4096
SHAPES = [(1,), (ROWS,), (2 * ROWS + 1,), (3, ROWS // 2)]

types = pytest.mark.parametrize("dtype", TYPES, ids=str)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
autocast = pytest.mark.parametrize("mixed", [False, True], ids=["", "autocast"])


def computed(function: Callable[..., torch.Tensor], logits: torch.Tensor, *labels: torch.Tensor) -> list[torch.Tensor]:
    """Values and gradient, each token with another weight."""
    own = logits.clone().requires_grad_()
    values = function(own, *labels)
    (values.double() * torch.linspace(-1, 1, values.numel()).view(values.shape)).sum().backward()
    assert own.grad is not None
    return [values.detach(), own.grad]


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, VOCABULARY, generator=generator) * 3
    return logits.to(dtype), torch.randint(VOCABULARY, shape, generator=generator)


@types
@shapes
@autocast
def test_log_probs_are_verls_to_the_last_bit(shape: tuple[int, ...], dtype: torch.dtype, mixed: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        ours, theirs = (computed(each, *drawn(shape, dtype)) for each in (LOG_PROBS, LOG_PROBS.__wrapped__))
    assert ours[0].dtype == theirs[0].dtype
    assert ours[0].shape == theirs[0].shape
    assert all(map(torch.equal, ours, theirs))


@types
@shapes
@autocast
def test_entropies_are_verls_to_the_last_bit(shape: tuple[int, ...], dtype: torch.dtype, mixed: bool) -> None:
    logits, _ = drawn(shape, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        ours, theirs = (computed(each, logits) for each in (ENTROPY, ENTROPY.__wrapped__))
    assert ours[0].dtype == theirs[0].dtype
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(("device", "tokens"), [("cpu", ROWS), ("meta", ON_ACCELERATOR)])
def test_pieces_are_of_some_tokens_and_leave_none_out(device: str, tokens: int) -> None:
    """Memory that is nowhere stands for an accelerator's."""
    pieces = pieces_of(torch.empty(2, tokens, VOCABULARY, device=device)[:, 1:])
    assert [tuple(piece.shape) for piece in pieces] == [(tokens, VOCABULARY), (tokens - 2, VOCABULARY)]


def kept(function: Callable[..., torch.Tensor], logits: torch.Tensor, labels: torch.Tensor) -> int:
    """Bytes that the backward pass waits for, but for the logits themselves."""
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = logits.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(own, labels)
    found.pop(own.untyped_storage().data_ptr(), None)
    return sum(found.values())


def test_no_copy_of_the_logits_waits_for_the_backward_pass() -> None:
    logits, labels = drawn((3 * ROWS,), torch.bfloat16)
    size = logits.numel() * logits.element_size()
    with torch.autocast("cpu", torch.bfloat16):
        assert kept(LOG_PROBS.__wrapped__, logits, labels) >= size
        assert kept(LOG_PROBS, logits, labels) < size / 20


def test_verls_engine_computes_with_them() -> None:
    """verl.utils.torch_functional.logprobs_from_logits, which the FSDP engine calls, takes them without the kernel."""
    engine: Any = transformer_impl
    assert engine.logprobs_from_logits is FUNCTIONAL.logprobs_from_logits
    assert engine.verl_F.entropy_from_logits is ENTROPY
    names = FUNCTIONAL.logprobs_from_logits.__code__.co_names
    assert {"FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", "logprobs_from_logits_v2"} <= set(names)
