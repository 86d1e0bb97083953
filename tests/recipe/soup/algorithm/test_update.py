"""What enters the loss, against loops; and that the driver's own fields stand wherever SOUP decides nothing."""

import math
from dataclasses import replace

import pytest
import torch

from recipe.soup.algorithm.batch import TrainRows
from recipe.soup.algorithm.losses.registry import RATIOS
from recipe.soup.algorithm.update import UpdateChoices, loss_fields, ratio_fields, weight_metrics

DEFAULT = UpdateChoices(
    mixes=True,
    ratio="behavior",
    baseline="group",
    prefix_gradient=1.0,
    second_moment=None,
    loss_tokens="all",
    continuation_weight="none",
    continuation_window=(0.025, 0.05),
    negative_bounds=(0.0, math.inf),
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
    unmixed = UpdateChoices(False, "shaped", "separate", 0.0, 0.01, "trained", "product", (0.1, 0.1), (0.9, 1.1))
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


@pytest.mark.parametrize("kind", ["product", "min", "window", "whole"])
@pytest.mark.parametrize("prefix_gradient", [1.0, 0.0])
def test_what_comes_behind_a_prefix_gets_its_weight_on_top_of_a_corrections(kind: str, prefix_gradient: float) -> None:
    rows, correction = batch(), torch.full((4, 4), 0.25)
    choices = replace(DEFAULT, continuation_weight=kind, prefix_gradient=prefix_gradient)
    fields, _ = loss_fields(rows, given(rows, rollout_is_weights=correction), choices, estimate)
    assert set(fields) == {"rollout_is_weights"}
    log_ratio = (rows.current_log_probs - rows.behavior_log_probs).double()
    for i, length in enumerate((2, 0, 1, 0)):
        prefix = log_ratio[i, :length].tolist()
        log_weight = {"min": min(prefix, default=0.0)}.get(kind, sum(prefix))
        if kind == "window":
            log_weight = max(min(log_weight, 0.05 * length**0.5), -0.025 * length**0.5)
        behind = torch.full((4 - length,), 0.25 * math.exp(log_weight))
        torch.testing.assert_close(fields["rollout_is_weights"][i, length:], behind)
        others = [math.exp(sum(prefix) - own) if kind == "whole" else 1.0 for own in prefix]
        on_prefix = 0.25 * prefix_gradient * torch.tensor(others)
        torch.testing.assert_close(fields["rollout_is_weights"][i, :length], on_prefix)


@pytest.mark.parametrize("ratio", ["behavior", "decoupled", "shaped"])
def test_a_weight_behind_the_prefix_moves_no_mask_no_advantage_and_no_ratio(ratio: str) -> None:
    rows, choices = batch(), replace(DEFAULT, ratio=ratio, continuation_weight="product")
    fields, trained = loss_fields(rows, given(rows), choices, estimate)
    assert set(fields) == {"rollout_is_weights"}
    assert torch.equal(trained, rows.is_historical)
    plain, weighed = ratio_fields(rows, replace(DEFAULT, ratio=ratio)), ratio_fields(rows, choices)
    assert all(torch.equal(plain[name], weighed[name]) for name in plain)


def test_weights_are_told_by_sample_where_there_are_any() -> None:
    rows = batch()
    trained = rows.is_historical
    assert weight_metrics(rows, rows.entropy, trained, DEFAULT) == {"soup/train/prefix/trained": 1.0}
    told = weight_metrics(rows, rows.entropy, trained, replace(DEFAULT, continuation_weight="window"))
    # Samples 0 and 2 have a prefix and go on behind it.
    sums = [float((rows.current_log_probs - rows.behavior_log_probs)[i][rows.is_historical[i]].sum()) for i in (0, 2)]
    held = [min(max(s, -0.025 * n**0.5), 0.05 * n**0.5) for s, n in zip(sums, (2, 1), strict=True)]
    name = "soup/train/continuation/weight"
    assert told[f"{name}/mean"] == pytest.approx(sum(map(math.exp, held)) / 2)
    assert told[f"{name}/max"] == pytest.approx(math.exp(max(held)))
    assert told[f"{name}/clipped"] == sum(h != s for h, s in zip(held, sums, strict=True)) / 2
    complete = replace(rows, is_historical=rows.response_mask)  # nothing goes on
    told = weight_metrics(
        complete, rows.entropy, complete.is_historical, replace(DEFAULT, continuation_weight="product")
    )
    assert [told[f"{name}/{key}"] for key in ("mean", "max", "clipped")] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("loss_tokens", ["all", "trained"])
def test_behind_an_outlier_a_negative_loses_prefix_and_continuation_and_is_counted(loss_tokens: str) -> None:
    rows = batch()
    # Sample 0 is stopped behind its first token, 2 behind its whole prefix of one; 1 and 3 have no prefix.
    log_ratio = torch.tensor([[1.0, 0.0, 0.0, 0.0], [9.0] * 4, [-1.0, 0.0, 0.0, 0.0], [9.0] * 4])
    rows = replace(rows, behavior_log_probs=rows.current_log_probs - log_ratio)
    choices = replace(DEFAULT, negative_bounds=(0.5, 2.0), loss_tokens=loss_tokens)
    negative = given(rows) | {"advantages": torch.full((4, 4), -1.0)}
    fields, trained = loss_fields(rows, negative, choices, estimate)
    counts = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]])
    assert torch.equal(fields["rollout_is_weights"], counts.float())
    assert torch.equal(trained, rows.is_historical & counts.bool())
    for name in ("response_mask", "loss_mask"):
        assert (name in fields) == (loss_tokens == "trained")
        if name in fields:
            assert torch.equal(fields[name], rows.response_mask * counts)
    told = weight_metrics(rows, negative["advantages"], trained, choices)
    assert told["soup/train/stale_negatives/samples"] == 2
    assert told["soup/train/stale_negatives/tokens"] == 3 + 1
    assert told["soup/train/prefix/trained"] == pytest.approx(2 / 3)
    positive, all_trained = loss_fields(rows, given(rows), choices, estimate)
    assert torch.equal(positive["rollout_is_weights"], torch.ones(4, 4))
    assert torch.equal(all_trained, rows.is_historical)
