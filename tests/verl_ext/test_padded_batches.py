"""Micro-batches of verl's FSDP engine where it pads: no larger than asked for, and otherwise verl's own.

That loss and gradient stay the same, on ranks with different numbers of tokens, is tested with two ranks
(`tests/recipe/soup/verl_adapter/test_modes.py`).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine.fsdp import transformer_impl

from verl_ext.padded_batches import of_similar_lengths, padded

ENGINE: Any = transformer_impl
LIMIT = 24576
MIXED_LENGTHS = [int(length) for length in np.random.default_rng(0).lognormal(6.2, 0.8, 128).clip(1, 7168) + 150]
"""Tokens of prompts and responses as a base model's are spread at first: 840 in the mean, 2,600 at most."""


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A process group, which verl's function asks how many micro-batches the other ranks have."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/store", rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def batch_of(lengths: list[int], packs: bool) -> TensorDict:
    rows = [torch.full((length,), number) for number, length in enumerate(lengths)]
    data = TensorDict({"input_ids": torch.nested.as_nested_tensor(rows, layout=torch.jagged)}, batch_size=len(rows))
    tu.assign_non_tensor(data, use_dynamic_bsz=True, use_remove_padding=packs, max_token_len_per_gpu=LIMIT, sp_size=1)
    return data


def sizes(micro_batches: list[Any]) -> list[int]:
    """Padded tokens of each."""
    lengths = [micro_batch["input_ids"].offsets().diff() for micro_batch in micro_batches]
    return [len(each) * int(each.max()) for each in lengths]


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
def test_padding_counts_where_there_is_any(packs: bool, one_rank: Any) -> None:
    data = batch_of(MIXED_LENGTHS, packs)
    micro_batches, parts = ENGINE.prepare_micro_batches(data, dp_group=one_rank, same_micro_num_in_dp=True)
    assert sorted(i for part in parts or [] for i in part) == list(range(len(MIXED_LENGTHS)))
    # verl puts results back in their places by these.
    for micro_batch, part in zip(micro_batches, parts or [], strict=True):
        assert [int(row[0]) for row in micro_batch["input_ids"].unbind()] == part
    assert (max(sizes(micro_batches)) <= LIMIT) is not packs


def test_micro_batches_that_fit_stay_verls_own(one_rank: Any) -> None:
    same = [400] * 40
    own, their = (
        ENGINE.prepare_micro_batches(batch_of(same, packs), dp_group=one_rank, same_micro_num_in_dp=True)
        for packs in (False, True)
    )
    assert own[1] == their[1]


@given(st.lists(st.integers(1, LIMIT), min_size=1, max_size=40), st.integers(1, 60))
def test_every_sample_once_and_none_above_the_limit(lengths: list[int], at_least: int) -> None:
    parts = of_similar_lengths(lengths, LIMIT)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(padded(part, lengths) <= LIMIT for part in parts)
    more = of_similar_lengths(lengths, LIMIT, at_least=min(at_least, len(lengths)))
    assert sorted(i for part in more for i in part) == list(range(len(lengths)))
    assert len(more) == max(len(parts), min(at_least, len(lengths)))
    assert all(padded(part, lengths) <= LIMIT for part in more)
