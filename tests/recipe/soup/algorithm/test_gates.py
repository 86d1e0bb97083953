"""Which samples count, against loops over prompts."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from recipe.soup.algorithm.batch import NOBODY, TrainRows, prefix_mask
from recipe.soup.algorithm.batch_metrics import demonstration_metrics, train_metrics
from recipe.soup.algorithm.gates import samples_that_count, without
from recipe.soup.algorithm.update import UpdateChoices, loss_fields
from recipe.soup.prefixes.prefix import UNKNOWN
from recipe.soup.verl_adapter.registrations import group_estimate

VERSION, WIDTH = 5, 4
DEFAULT = UpdateChoices(True, "luffy", "group", 1.0, None, "all", "none", (0.0, 0.0), (0.0, math.inf))
Kinds = list[tuple[str, str, float]]
"""Prompt, kind (own, prefix, whole, padding) and reward of each sample."""


def rows_of(samples: Kinds) -> TrainRows:
    """Each of three tokens; a padding row copies the first sample's versions."""
    own, prefix, whole = [VERSION] * 3, [NOBODY, VERSION, VERSION], [NOBODY] * 3
    versions = torch.tensor([[*{"own": own, "prefix": prefix}.get(kind, whole), 0] for _, kind, _ in samples])
    mask = torch.tensor([[kind != "padding"] * 3 + [False] for _, kind, _ in samples])
    generator = torch.Generator().manual_seed(0)
    shape = mask.shape
    return TrainRows(
        response_mask=mask,
        response_ids=torch.zeros(shape, dtype=torch.long),
        is_historical=prefix_mask(versions, mask, VERSION),
        policy_versions=versions,
        behavior_log_probs=torch.zeros(shape),
        current_log_probs=-torch.rand(shape, generator=generator),
        entropy=torch.rand(shape, generator=generator),
        rewards=torch.tensor([reward for _, _, reward in samples]),
        uids=[uid for uid, _, _ in samples],
        current_version=VERSION,
    )


def counted(samples: Kinds, gate: str, most: int) -> list[bool]:
    """Prompt by prompt."""
    result = []
    for uid, kind, _ in samples:
        group = [(k, r) for u, k, r in samples if u == uid and k != "padding"]
        solved = sum(k == "own" and r > 0 for k, r in group)
        shown = kind in ("prefix", "whole")
        if kind == "padding":
            result.append(False)
        elif gate == "always":
            result.append(True)
        elif gate == "unsolved":
            result.append(not shown or solved == 0)
        else:
            imitates = solved <= most and any(k != "own" for k, _ in group)
            result.append(shown == imitates)
    return result


def samples() -> st.SearchStrategy[Kinds]:
    kinds, rewards = st.sampled_from(["own", "own", "prefix", "whole", "padding"]), st.sampled_from([-1.0, 0.0, 1.0])
    return st.lists(st.tuples(st.sampled_from("abc"), kinds, rewards), min_size=1, max_size=12)


def test_both_rooms_mean_the_same_version() -> None:
    assert UNKNOWN == NOBODY


@given(samples=samples(), gate=st.sampled_from(["always", "unsolved", "successes"]), most=st.integers(0, 3))
def test_against_loops(samples: Kinds, gate: str, most: int) -> None:
    rows = rows_of(samples)
    kept = samples_that_count(rows, gate, most)
    assert kept.tolist() == counted(samples, gate, most)
    # No group loses all of its samples.
    assert {uid for uid, kind, _ in samples if kind != "padding"} == {
        uid for uid, counts in zip(rows.uids, kept.tolist(), strict=True) if counts
    }
    left = without(rows, kept)
    assert torch.equal(left.response_mask.any(dim=1), kept)
    told = demonstration_metrics(rows, gate, most)
    assert told["soup/train/demonstration/left_out"] == sum(
        kind != "padding" and not counts for (_, kind, _), counts in zip(samples, kept.tolist(), strict=True)
    )


EXAMPLE: Kinds = [
    ("hard", "own", 0.0),
    ("hard", "own", 0.0),
    ("hard", "whole", 1.0),
    ("easy", "own", 1.0),
    ("easy", "own", 0.0),
    ("easy", "whole", 1.0),
    ("none", "own", 0.0),
    ("none", "own", 0.0),
]
KEPT = {
    "unsolved": [True, True, True, True, True, False, True, True],
    "successes": [False, False, True, True, True, False, True, True],
}


def centred(rewards: torch.Tensor, groups: object) -> torch.Tensor:
    names = list(groups)  # pyright: ignore[reportArgumentType]
    means = [float(torch.stack([r for r, g in zip(rewards, names, strict=True) if g == name]).mean()) for name in names]
    return rewards - torch.tensor(means)


@pytest.mark.parametrize("gate", KEPT)
def test_what_is_left_out_is_in_no_mask_and_in_no_baseline(gate: str) -> None:
    rows = rows_of(EXAMPLE)
    mask = rows.response_mask.long()
    given_fields = {"advantages": torch.full(mask.shape, 9.0), "response_mask": mask, "loss_mask": mask.clone()}
    choices = replace(DEFAULT, ratio="nll", gate=gate)
    fields, trained = loss_fields(rows, given_fields, choices, centred)
    kept = torch.tensor(KEPT[gate])
    for name in ("response_mask", "loss_mask"):
        assert torch.equal(fields[name], mask * kept[:, None])
    for i, (uid, _, reward) in enumerate(EXAMPLE):
        group = [r for (u, _, r), k in zip(EXAMPLE, KEPT[gate], strict=True) if k and u == uid]
        expected = reward - sum(group) / len(group) if kept[i] else 0.0
        assert fields["advantages"][i, :3].tolist() == pytest.approx([expected] * 3)
    assert torch.equal(trained, rows.is_demonstration & kept[:, None])


@pytest.mark.parametrize("estimator", ["soup", "rloo"])
@given(samples=samples(), gate=st.sampled_from(["unsolved", "successes"]))
def test_what_a_gate_leaves_alone_has_no_advantage(estimator: str, samples: Kinds, gate: str) -> None:
    """With verl's own estimators, for which a group of one has its reward for an advantage."""
    rows = rows_of([*samples, ("d", "own", 1.0), ("d", "whole", 1.0)])
    mask = rows.response_mask.long()
    given_fields = {"advantages": torch.full(mask.shape, 9.0), "response_mask": mask, "loss_mask": mask.clone()}
    algorithm = OmegaConf.create({"adv_estimator": estimator, "norm_adv_by_std_in_grpo": True})
    choices = replace(DEFAULT, ratio="nll", gate=gate)
    fields, _ = loss_fields(rows, given_fields, choices, group_estimate(algorithm))
    kept = samples_that_count(rows, gate, 0).tolist()
    uids = [uid for uid, counts in zip(rows.uids, kept, strict=True) if counts]
    for row, uid in enumerate(rows.uids):
        if uids.count(uid) < 2:
            assert not fields["advantages"][row].any()
    assert uids.count("d") == 1  # whichever gate


def test_with_an_open_gate_nothing_of_the_drivers_changes() -> None:
    rows = rows_of(EXAMPLE)
    mask = rows.response_mask.long()
    given_fields = {"advantages": torch.full(mask.shape, 9.0), "response_mask": mask, "loss_mask": mask.clone()}
    choices = DEFAULT
    fields, trained = loss_fields(rows, given_fields, choices, centred)
    assert fields == {}
    assert torch.equal(trained, rows.is_demonstration)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_tokens_of_a_demonstration_may_be_context_only(share: float) -> None:
    rows = rows_of(EXAMPLE)
    mask = rows.response_mask.long()
    given_fields = {"advantages": torch.full(mask.shape, 9.0), "response_mask": mask, "loss_mask": mask.clone()}
    choices = replace(DEFAULT, prefix_gradient=share)
    fields, trained = loss_fields(rows, given_fields, choices, centred)
    most_entropic = sorted(rows.entropy[rows.is_demonstration].tolist(), reverse=True)[: round(6 * share)]
    assert sorted(rows.entropy[trained].tolist(), reverse=True) == most_entropic
    assert torch.equal(fields["rollout_is_weights"] == 0, rows.is_demonstration & ~trained)


def test_demonstrations_are_neither_history_nor_the_policys_own() -> None:
    rows = rows_of([("a", "prefix", 1.0), ("a", "whole", 0.0), ("a", "own", 0.5), ("a", "padding", 7.0)])
    rows = replace(rows, current_log_probs=torch.where(rows.is_demonstration, rows.current_log_probs - 50, 0.25))
    told = train_metrics(rows)
    assert not rows.is_historical.any()
    assert (
        told["soup/train/prefix/tokens"] == told["soup/train/prefix/length/max"] == told["soup/train/tool_tokens"] == 0
    )
    assert told["soup/train/continuation/tokens"] == 5
    assert told["soup/train/continuation/engine_mismatch/max"] == 0.25
    assert (told["soup/train/mixed/samples"], told["soup/train/mixed/without_continuation"]) == (2, 1)
    assert told["soup/train/reward/mixed_minus_pure"] == 0
    shown = demonstration_metrics(rows, "always", 0)
    name = "soup/train/demonstration"
    assert (shown[f"{name}/samples"], shown[f"{name}/tokens"], shown[f"{name}/reward"]) == (2, 4, 0.5)
    assert shown[f"{name}/nll"] == pytest.approx(float(-rows.current_log_probs[rows.is_demonstration].mean()))
    assert shown[f"{name}/share"] == pytest.approx(4 / 9)
