"""The splice, and the objective that it gives with our loss and verl's average, against loops in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from verl.trainer.ppo.core_algos import agg_loss

from recipe.soup.algorithm.batch import prefix_mask, splice_behavior_log_probs
from recipe.soup.algorithm.losses.inputs import Clip, LossInputs
from recipe.soup.algorithm.losses.registry import RATIOS


def random_rows(seed: int, batch: int = 5, width: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (batch,), generator=generator)
    response_mask = (torch.arange(width) < lengths[:, None]).long()
    prefix_lengths = (torch.rand(batch, generator=generator) * (lengths + 1)).long()
    versions = torch.where(torch.arange(width) < prefix_lengths[:, None], 3, 9)
    noise = lambda: -torch.rand(batch, width, generator=generator, dtype=torch.float64) * 2  # noqa: E731
    return {
        "response_mask": response_mask,
        "versions": versions,
        "behavior": noise(),
        "current": noise(),
        "log_prob": noise(),
        "advantages": torch.randn(batch, 1, generator=generator, dtype=torch.float64).expand(-1, width),
    }


@given(seed=st.integers(0, 10**6))
def test_splice_takes_each_token_from_the_policy_that_sampled_it(seed: int) -> None:
    rows = random_rows(seed)
    prefix = prefix_mask(rows["versions"], rows["response_mask"], current_version=9)
    old = splice_behavior_log_probs(rows["current"], rows["behavior"], prefix)
    for b in range(old.size(0)):
        for t in range(old.size(1)):
            historical = rows["response_mask"][b, t] and rows["versions"][b, t] < 9
            assert old[b, t] == (rows["behavior"] if historical else rows["current"])[b, t]


@given(seed=st.integers(0, 10**6))
def test_without_prefixes_the_splice_is_the_identity(seed: int) -> None:
    rows = random_rows(seed)
    prefix = prefix_mask(torch.full_like(rows["versions"], 9), rows["response_mask"], current_version=9)
    assert not prefix.any()
    assert torch.equal(splice_behavior_log_probs(rows["current"], rows["behavior"], prefix), rows["current"])


def test_masked_tokens_are_no_prefix_whatever_their_version() -> None:
    assert not prefix_mask(torch.zeros(2, 3), torch.zeros(2, 3), current_version=5).any()


def objective(rows: dict[str, torch.Tensor], low: float, high: float, dual: float) -> float:
    """The paper's J with PPO's dual clip, token by token in float64; the loss is its negative."""
    total, count = 0.0, 0
    for b in range(rows["versions"].size(0)):
        for t in range(rows["versions"].size(1)):
            if not rows["response_mask"][b, t]:
                continue
            count += 1
            mu = rows["behavior"] if rows["versions"][b, t] < 9 else rows["current"]
            ratio = math.exp(float(rows["log_prob"][b, t]) - float(mu[b, t]))
            a = float(rows["advantages"][b, t])
            term = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
            total += max(term, dual * a) if a < 0 else term
    return total / count


@pytest.mark.parametrize("seed", range(20))
def test_the_loss_on_spliced_log_probs_is_the_papers_objective(seed: int) -> None:
    rows = random_rows(seed)
    prefix = prefix_mask(rows["versions"], rows["response_mask"], current_version=9)
    log_prob = rows["log_prob"].clone().requires_grad_()
    inputs = LossInputs(
        log_probs=log_prob,
        old_log_probs=splice_behavior_log_probs(rows["current"], rows["behavior"], prefix),
        advantages=rows["advantages"],
        prefix=prefix,
        clip=Clip(low=0.2, high=0.28, prefix_low=0.2, prefix_high=0.28, dual=3.0),
    )
    losses = RATIOS["behavior"].loss(inputs).losses
    value = agg_loss(loss_mat=losses, loss_mask=rows["response_mask"].bool(), loss_agg_mode="token-mean")
    assert value.item() == pytest.approx(-objective(rows, 0.2, 0.28, 3.0), rel=1e-12)
    value.backward()
    for b, t in torch.nonzero(rows["response_mask"]).tolist():
        step = torch.zeros_like(rows["log_prob"])
        step[b, t] = 1e-6
        slope = (objective({**rows, "log_prob": rows["log_prob"] + step}, 0.2, 0.28, 3.0)
                 - objective({**rows, "log_prob": rows["log_prob"] - step}, 0.2, 0.28, 3.0)) / 2e-6  # fmt: skip
        assert log_prob.grad is not None
        assert log_prob.grad[b, t].item() == pytest.approx(-slope, abs=1e-7)
