"""What enters the loss, against loops; and that the driver's own fields stand wherever SOUP decides nothing."""

from dataclasses import replace

import pytest
import torch

from recipe.soup.algorithm.batch import TrainRows
from recipe.soup.algorithm.losses.registry import RATIOS
from recipe.soup.algorithm.update import UpdateChoices, loss_fields, ratio_fields

DEFAULT = UpdateChoices(
    mixes=True, ratio="behavior", baseline="group", prefix_gradient=1.0, second_moment=None, loss_tokens="all"
)
VERSION = 5


def batch() -> TrainRows:
    """Two prompts with two samples each, the first of them mixed; lengths 4, 3, 2 and 4."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(4) < torch.tensor([4, 3, 2, 4])[:, None]
    versions = torch.tensor([[2, 2, 5, 5], [5, 5, 5, 0], [3, 5, 0, 0], [5, 5, 5, 5]])
    return TrainRows(
        response_mask=mask,
        response_ids=torch.randint(9, (4, 4), generator=generator),
        is_historical=(versions < VERSION) & mask,
        policy_versions=versions,
        behavior_log_probs=-torch.rand(4, 4, generator=generator),
        current_log_probs=-torch.rand(4, 4, generator=generator),
        entropy=torch.rand(4, 4, generator=generator),
        rewards=torch.tensor([1.0, 0.0, 0.0, 1.0]),
        uids=["a", "a", "b", "b"],
        current_version=VERSION,
    )


def given(rows: TrainRows, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = rows.response_mask.long()
    return {"advantages": torch.full(mask.shape, 0.5), "response_mask": mask, "loss_mask": mask.clone(), **more}


def estimate(rewards: torch.Tensor, groups: object) -> torch.Tensor:
    """One that shows that it was asked."""
    return rewards + 10


@pytest.mark.parametrize("mixes", [True, False])
@pytest.mark.parametrize("ratio", RATIOS)
def test_old_log_probs_are_spliced_where_the_ratio_wants_it_and_the_run_mixes(ratio: str, mixes: bool) -> None:
    rows = batch()
    fields = ratio_fields(rows, replace(DEFAULT, ratio=ratio, mixes=mixes))
    for i in range(4):
        for t in range(4):
            old = rows.policy_versions[i, t] < VERSION and bool(rows.response_mask[i, t])
            by_behavior = old and mixes and ratio != "decoupled"
            source = rows.behavior_log_probs if by_behavior else rows.current_log_probs
            assert fields["old_log_probs"][i, t] == source[i, t]
            assert fields["prefix_mask"][i, t] == int(old)


def test_the_defaults_change_nothing_and_a_run_that_does_not_mix_never_does() -> None:
    rows = batch()
    assert loss_fields(rows, given(rows), DEFAULT, estimate)[0] == {}
    unmixed = UpdateChoices(False, "shaped", "separate", 0.0, 0.01, "trained")
    assert loss_fields(rows, given(rows), unmixed, estimate)[0] == {}


def test_another_baseline_takes_the_place_of_the_drivers_advantages_within_its_mask() -> None:
    """verl's rejection sampling may have taken tokens out of the mask since the batch was put together."""
    rows = batch()
    rejected = rows.response_mask.long()
    rejected[1, 0] = 0
    fields, _ = loss_fields(
        rows, given(rows) | {"response_mask": rejected}, replace(DEFAULT, baseline="separate"), estimate
    )
    assert set(fields) == {"advantages", "returns"}
    assert torch.equal(fields["advantages"], (rows.rewards[:, None] + 10) * rejected)
    assert torch.equal(fields["returns"], fields["advantages"])


def test_a_budget_judges_the_advantages_that_enter_the_loss() -> None:
    """Which tokens may leave depends on the sign of the advantage, here of the baseline's and not of the driver's."""
    rows = batch()
    log_ratio = rows.current_log_probs - rows.behavior_log_probs
    choices = replace(DEFAULT, second_moment=1e-9)
    for baseline, sign in (("group", -1), ("separate", 1)):  # the driver's are negative, the estimate's are not
        fields = given(rows) | {"advantages": torch.full((4, 4), -1.0)}
        _, trained = loss_fields(rows, fields, replace(choices, baseline=baseline), estimate)
        assert torch.equal(trained, rows.is_historical & (sign * log_ratio <= 0))


@pytest.mark.parametrize("loss_tokens", ["all", "trained"])
def test_untrained_prefix_tokens_lose_their_weight_and_if_asked_their_place_in_the_mean(loss_tokens: str) -> None:
    rows = batch()
    correction = torch.full((4, 4), 0.25)
    choices = replace(DEFAULT, prefix_gradient=0.0, loss_tokens=loss_tokens)
    fields, trained = loss_fields(rows, given(rows, rollout_is_weights=correction), choices, estimate)
    assert not trained.any()
    assert torch.equal(fields["rollout_is_weights"], torch.where(rows.is_historical, 0.0, 0.25))
    alone, _ = loss_fields(rows, given(rows), choices, estimate)
    assert torch.equal(alone["rollout_is_weights"], (~rows.is_historical).float())
    for name in ("response_mask", "loss_mask"):
        assert (name in fields) == (loss_tokens == "trained")
        if name in fields:
            assert torch.equal(fields[name], (rows.response_mask & ~rows.is_historical).long())
