"""How weights become a snapshot: data types, shards, and what Ray's store is given."""

import pickle
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from verl_ext.historical_policy.writing import narrowed, pack, stage, unpack, write_shards

BF16, FP32 = torch.bfloat16, torch.float32


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-40, 1e-3, 1.0, 1e30]))
def test_the_engines_weights_are_bit_for_bit_those_that_verl_gave_the_current_policy(seed: int, scale: float) -> None:
    """verl sends fp32, which vLLM's loader rounds; a snapshot is rounded already."""
    trained = scale * torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
    current, historical = (torch.nn.Parameter(torch.empty(8, 16, dtype=BF16)) for _ in range(2))
    default_weight_loader(current, trained)
    default_weight_loader(historical, stage([("w", trained)], BF16)["w"])
    assert torch.equal(bits(current.data), bits(historical.data))


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "expected"),
    [
        ("model.layers.0.mlp.gate_proj.weight", (4, 2), FP32, BF16),
        ("lm_head.weight", (4, 2), FP32, BF16),
        ("model.layers.0.mlp.experts.gate_up_proj", (3, 4, 2), FP32, BF16),
        ("lm_head.weight", (4, 2), BF16, BF16),
        ("lm_head.scale", (4, 2), torch.int32, torch.int32),
        # vLLM keeps these in fp32, of some models.
        ("model.layers.0.mlp.gate.weight", (4, 2), FP32, FP32),
        ("model.layers.0.mlp.router.weight", (4, 2), FP32, FP32),
        ("model.layers.0.router_proj.weight", (4, 2), FP32, FP32),
        ("model.layers.0.mlp.gate.e_score_correction_bias", (4,), FP32, FP32),
        ("model.layers.0.linear_attn.A_log", (4,), FP32, FP32),
        ("scale", (), FP32, FP32),
    ],
)
def test_only_what_the_engine_would_round_is_rounded(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, expected: torch.dtype
) -> None:
    assert narrowed(name, torch.zeros(shape, dtype=dtype), BF16).dtype == expected
    assert narrowed(name, torch.zeros(shape, dtype=dtype), None).dtype == dtype


def test_nothing_is_widened() -> None:
    assert stage([("w", torch.zeros(2, 2, dtype=BF16))], FP32)["w"].dtype == BF16


@given(st.lists(st.integers(0, 30), max_size=8), st.integers(1, 60))
def test_every_tensor_is_in_one_shard_of_about_that_size(sizes: list[int], shard_bytes: int) -> None:
    staged = {str(i): torch.full((size,), i, dtype=torch.uint8) for i, size in enumerate(sizes)}
    expected = dict(staged)
    with TemporaryDirectory() as folder:
        shards = [
            load_file(shard) for shard in write_shards(staged, shard_bytes, Path(folder)) if isinstance(shard, Path)
        ]
    assert staged == {}
    assert [name for shard in shards for name in sorted(shard, key=int)] == list(expected)
    for shard in shards:
        assert all(torch.equal(tensor, expected[name]) for name, tensor in shard.items())
        assert sum(len(expected[name]) for name in sorted(shard, key=int)[:-1]) < shard_bytes
    for shard in shards[:-1]:
        assert sum(len(tensor) for tensor in shard.values()) >= shard_bytes


def test_rays_store_gets_the_bytes_apart_from_the_rest_so_that_they_are_copied_once() -> None:
    tensors = {"w": torch.randn(64, 64).to(BF16), "scale": torch.tensor(2.0), "none": torch.zeros(0, 3)}
    buffers: list[pickle.PickleBuffer] = []
    message = pickle.dumps(pack(tensors), protocol=5, buffer_callback=buffers.append)
    assert len(message) < 1000
    assert buffers[0].raw().obj is not None
    # What Ray does with our own bytes between two processes; read-only, as its buffers are.
    received = unpack(pickle.loads(message, buffers=[bytes(buffer) for buffer in buffers]))  # noqa: S301
    for name, tensor in tensors.items():
        assert (received[name].dtype, received[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(received[name], tensor)
