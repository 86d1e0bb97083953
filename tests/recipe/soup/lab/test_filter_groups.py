"""DAPO's filter in the lab: which groups go, how many are asked for in their place, and what is counted."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from recipe.soup.lab.driver import Lab
from recipe.soup.lab.filter_groups import EVICTED, SURPLUS, filled, has_signal
from recipe.soup.lab.forward import Sample
from recipe.soup.lab.rollout import Asked, Group
from recipe.soup.prefixes.requests import PromptRequests
from recipe.soup.records.problems import Problem
from recipe.soup.tools.compare.results import Result, generated_tokens

FILTER = ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=reward", "data.gen_batch_size=1")
SMALL = ("data.train_batch_size=4", "actor_rollout_ref.actor.ppo_mini_batch_size=2", "data.val_max_samples=8")


def group(*scores: float, **told: Any) -> Group:
    samples = [Sample([1], [2], [0], [-1.0], score, 0) for score in scores]
    return Group(Asked(Problem([], {}), 0, PromptRequests()), samples, [{"score": score, **told} for score in scores])


REPLAY = ("algorithm=soup", "algorithm.soup.source=replay", "data.train_max_samples=24")
STEERED = (*REPLAY, "algorithm.soup.selection=steered")
GROUPS = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0, 1.0), (0.5,), (), (0.25, 0.5, 0.25)]


@pytest.mark.parametrize("scores", GROUPS, ids=str)
def test_a_group_goes_if_verl_evicts_it(scores: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import torch
    import transfer_queue as tq

    data = {"rm_scores": [torch.tensor([score]) for score in scores]}
    monkeypatch.setattr(tq, "kv_batch_get", lambda keys, partition_id, select_fields: data)
    keys = {f"u_{i}_0": {} for i in range(len(scores))}
    buffer: Any = SimpleNamespace(
        filter_groups_metric="reward",
        finished_keys={"train": {"u"}},
        partitions={"train": keys},
        _dapo_classification_cache={"train": {}},
    )
    if scores:
        evicted, counts = ReplayBuffer._dapo_filtered_keys(buffer, "train")
        assert counts == (Counter({scores[0]: 1}) if evicted else Counter())
        assert has_signal(group(*scores), "reward") == (not evicted)
    else:
        assert has_signal(group(), "reward")  # verl pads a group of which nothing is left


def test_another_metric_decides_if_it_is_named() -> None:
    assert not has_signal(group(0.0, 1.0, acc=True), "acc")
    with pytest.raises(KeyError, match="acc"):
        has_signal(group(0.0, 1.0), "acc")


@pytest.mark.parametrize("most", [1, 2])
def test_two_are_asked_for_each_that_goes(most: int) -> None:
    """Four are wanted. Of those that come, every other one has a signal, but of the first ones only one."""
    config = OmegaConf.create(
        {
            "algorithm": {"filter_groups": {"metric": "reward", "max_inflight_gen_batches": most}},
            "data": {"train_batch_size": 4},
        }
    )
    calls: list[int] = []

    def refill(count: int) -> list[Group]:
        calls.append(count)
        if sum(calls) > 12:
            return [group(0.0, 1.0)] * count
        return [group(0.0, float(i == 0 and len(calls) > 1)) for i in range(count)]

    first = [group(0.0, 1.0), *[group(1.0, 1.0)] * 3]
    filtered = filled(first, config, refill)
    assert all(count <= 4 * most for count in calls)
    assert calls[0] == min(6, 4 * most)
    assert len(filtered.groups) == 4
    assert all(has_signal(g, "reward") for g in filtered.groups)
    everything = 4 + sum(calls)
    assert filtered.metrics[EVICTED] + filtered.metrics.get(SURPLUS, 0) == everything - 4 == len(filtered.dropped)


def lab(composed: Any, *overrides: str) -> Lab:
    config: DictConfig = composed("example=countdown", *SMALL, "trainer.logger=[]", *overrides)
    return Lab(config)


@pytest.mark.parametrize(
    "overrides",
    [("algorithm=grpo",), ("algorithm=soup", "algorithm.soup.lag=1"), REPLAY, STEERED],
    ids=["grpo", "lookahead", "replay", "steered"],
)
def test_every_group_that_is_trained_on_has_a_signal(overrides: tuple[str, ...], composed: Any) -> None:
    plain, filtered = lab(composed, *overrides), lab(composed, *overrides, *FILTER)
    evicted = 0.0
    for step in range(1, 6):
        metrics = filtered.step(step)
        assert metrics["soup/train/groups_with_signal"] == 1
        assert metrics["soup/train/samples/trained"] == 32
        groups = metrics.get(EVICTED, 0) + metrics.get(SURPLUS, 0)
        assert metrics["soup/train/samples/asked"] == 32 + 8 * groups
        assert (metrics["soup/cost/evicted_tokens"] > 0) == (groups > 0)
        evicted += metrics.get(EVICTED, 0)
        assert plain.step(step)["soup/cost/evicted_tokens"] == 0
    assert evicted > 0
    if overrides == STEERED:
        # Controllers of evicted groups move as well: more prompts than five steps of four.
        assert len(filtered.source.steering.prompts) > 20  # pyright: ignore[reportAttributeAccessIssue]
    assert np.isfinite(metrics["actor/grad_norm"])


VERIFIED = (*REPLAY, "algorithm.soup.selection=verified", "algorithm.soup.mixed_share=1", "trainer.total_epochs=9")
COSTS = {
    "lookahead": ("algorithm=soup", "algorithm.soup.lag=2"),
    "snapshot": ("algorithm=soup", "algorithm.soup.source=snapshot", "algorithm.soup.snapshot.policy=base"),
    "steered": STEERED,
    "verified": VERIFIED,
}


@pytest.mark.parametrize("name", COSTS)
def test_a_report_counts_each_token_once_that_was_sampled(
    name: str, composed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What studies compare costs by, against the sampler: with evicted groups and prefixes, without accepted tokens."""
    run = lab(composed, *COSTS[name], *(FILTER if name != "snapshot" else ()))
    sample, sampled = run.rollout.sample, []

    def counted(*args: Any) -> Any:
        answers = sample(*args)
        sampled.extend(len(answer.token_ids) for answer in answers)
        return answers

    monkeypatch.setattr(run.rollout, "sample", counted)
    metrics = {step: run.step(step) for step in range(1, 8)}
    assert generated_tokens(Result(name, 0, metrics, {})).sum() == sum(sampled)
