"""What a step leaves behind, on verl's two kinds of trainers."""

import numpy as np
import torch

from recipe.soup.algorithm.batch import TrainRows
from recipe.soup.names import SAMPLED_KEY
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.requests import SampledPrefix
from recipe.soup.verl_adapter.step_state import StepState


def full() -> StepState:
    empty = torch.zeros(2, 0)
    rows = TrainRows(*[empty] * 7, rewards=torch.zeros(2), uids=["a", "a"], current_version=0)
    state = StepState(rows=rows, shown=[["question", "answer", 1.0]])
    prefix = Prefix(np.arange(2, dtype=np.int32), np.zeros(2, np.float32), ((4, 2),))
    extra = {SAMPLED_KEY: [SampledPrefix(40, 0, prefix, 3, False).pack()]}
    state.add_prefixes([extra, extra], [{}, {"is_padding": True}])
    return state


def test_padding_rows_bring_no_prefixes() -> None:
    assert [prefix.ordinal for prefix in full().prefixes] == [40]


def test_what_an_update_has_used_is_forgotten() -> None:
    """What is shown waits for a validation."""
    state = full()
    state.clear()
    assert state == StepState(shown=[["question", "answer", 1.0]])
