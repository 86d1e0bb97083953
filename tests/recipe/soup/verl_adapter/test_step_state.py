"""What a step leaves behind, on verl's two kinds of trainers."""

import numpy as np
import pytest
import torch

from recipe.soup.algorithm.batch import TrainRows
from recipe.soup.names import SAMPLED_KEY
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.requests import SampledPrefix
from recipe.soup.verl_adapter.step_state import StepState


def full() -> StepState:
    empty = torch.zeros(2, 0)
    rows = TrainRows(*[empty] * 7, rewards=torch.zeros(2), uids=["a", "a"], current_version=0)
    state = StepState(visits={"a": (0, "?"), "b": (1, "?")}, rows=rows, shown=[["question", "answer", 1.0]])
    prefix = Prefix(np.arange(2, dtype=np.int32), np.zeros(2, np.float32), ((4, 2),))
    extra = {SAMPLED_KEY: [SampledPrefix(40, 0, prefix, 3, False).pack()]}
    state.add_prefixes([extra, extra], [{}, {"is_padding": True}])
    return state


def test_padding_rows_bring_no_prefixes() -> None:
    assert [prefix.ordinal for prefix in full().prefixes] == [40]


@pytest.mark.parametrize("others_wait", [True, False])
def test_only_what_was_trained_on_is_forgotten(others_wait: bool) -> None:
    """Where responses outlive a step, the visits of other prompts stay; what is shown waits for a validation."""
    state = full()
    state.clear(others_wait)
    left = {"b": (1, "?")} if others_wait else {}
    assert state == StepState(visits=left, shown=[["question", "answer", 1.0]])
