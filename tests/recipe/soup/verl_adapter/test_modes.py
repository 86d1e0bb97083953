"""Every setting of the loss once through verl's real training worker, against the mathematics on a plain model.

One mini-batch, so that the gradient is taken at the very weights that computed the old log-probs; the recorded prefixes
were sampled by other weights, so their ratios are far from one. The gradient norm that verl reports is compared with
that of a loss that is written down here anew and differentiated through plain transformers.
"""

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from training_worker import COUNTDOWN, STEP, StillWorkers, Store, WorkerGroup, make_trainer, recorded, update
from transfer_queue import KVBatchMeta
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from recipe.soup.algorithm.batch import NOBODY
from recipe.soup.algorithm.losses.registry import RATIOS
from recipe.soup.settings.loss import TAKES_NO_RATIO
from recipe.soup.verl_adapter.trainer import SoupTrainer

pytestmark = pytest.mark.usefixtures("process_group")

ONE_MINI_BATCH = "actor_rollout_ref.actor.ppo_mini_batch_size=8"
LOW, HIGH, DUAL, GAMMA, CAP, BUDGET, COEFFICIENT = 0.2, 0.28, 3.0, 0.1, 2.0, 0.005, 0.3
ACTOR, ROLLOUT, LIMIT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", 94
PADDED_TO_A_LIMIT = [
    f"{ACTOR}.use_dynamic_bsz=true",
    f"{ACTOR}.ppo_max_token_len_per_gpu={LIMIT}",
    f"{ACTOR}.ppo_micro_batch_size_per_gpu=null",
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=null",
]
"""Micro-batches by tokens, of which a rank needs more than the other (`verl_ext/padded_batches.py`)."""

TIED = "actor_rollout_ref.model.override_config.tie_word_embeddings"

Rows = list[dict[str, Any]]
Term = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From log pi (with gradient), log mu and A of the prefix tokens to their objective; at update start pi_old is pi."""


def clipped(ratio: torch.Tensor, a: torch.Tensor, low: float = LOW, high: float = HIGH) -> torch.Tensor:
    objective = torch.min(ratio * a, ratio.clip(1 - low, 1 + high) * a)
    return torch.where(a < 0, objective.clip(min=DUAL * a), objective)


def shaped(ratio: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return a * ratio / (ratio + GAMMA)


TERMS: dict[str, Term] = {
    "behavior": lambda pi, mu, a: clipped((pi - mu).exp(), a),
    "decoupled": lambda pi, mu, a: clipped((pi - pi.detach()).exp(), a) * (pi - mu).detach().exp().clip(max=CAP),
    "detached": lambda pi, mu, a: (pi - pi.detach()).exp() * a,
    "shaped": lambda pi, mu, a: shaped((pi - mu).exp(), a),
    "luffy": lambda pi, mu, a: shaped(pi.exp(), a),
    "nll": lambda pi, mu, a: COEFFICIENT * pi,
}
DATASET = ["algorithm.soup.source=dataset", f"algorithm.soup.nll_coefficient={COEFFICIENT}"]


def log_probs_of(rows: Rows, model: torch.nn.Module) -> list[torch.Tensor]:
    """Of the response tokens of each row, in float64 from the logits on."""
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].double()
    log_probs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    ends = [len(row["input_ids"]) - 1 for row in rows]
    return [values[end - len(row["responses"]) : end] for values, row, end in zip(log_probs, rows, ends, strict=True)]


def loss_of(
    rows: Rows,
    model: torch.nn.Module,
    term: Term,
    weights: list[torch.Tensor] | None = None,
    on_the_rest: Term = TERMS["detached"],  # a ratio of one, which no clip touches
    behind: list[float] | None = None,
) -> torch.Tensor:
    """Token mean of the negative objective, over all response tokens.

    Args:
        weights: of the prefix tokens of each row.
        behind: the weight of each row's other tokens.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for i, (row, pi) in enumerate(zip(rows, log_probs_of(rows, model), strict=True)):
        prefix = row["policy_versions"] < STEP - 1
        a = row["advantages"].double()
        objective = torch.empty_like(pi)
        mu = row["rollout_log_probs"].double()
        objective[~prefix] = on_the_rest(pi, mu, a)[~prefix] * (behind[i] if behind is not None else 1)
        on_prefix = term(pi, mu, a)[prefix]
        objective[prefix] = on_prefix * (weights[i][prefix] if weights is not None else 1)
        total, count = total - objective.sum(), count + len(pi)
    return total / count


def gradient_norm(loss: torch.Tensor, model: torch.nn.Module) -> float:
    model.zero_grad()
    loss.backward()
    squares = [(p.grad.double() ** 2).sum() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


@pytest.fixture(scope="module")
def plain_model(countdown_dir: Any) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(countdown_dir / "base_model", dtype=torch.float32)


def run(composed: Any, store: Store, *overrides: str) -> tuple[dict, Rows]:
    config = composed(*COUNTDOWN, "algorithm=soup", ONE_MINI_BATCH, *overrides)
    shown = config.algorithm.soup.source == "dataset"
    _, metrics = update(SoupTrainer, config, store, loss=True, mixed=True, demonstrations=shown)
    return metrics, list(store.rows.values())


@pytest.mark.parametrize("ratio", [name for name in RATIOS if name != "nll"])
def test_each_ratio_gives_the_gradient_of_its_formula(
    ratio: str, composed: Any, store: Store, plain_model: torch.nn.Module
) -> None:
    metrics, rows = run(composed, store, f"algorithm.soup.ratio={ratio}")
    # verl's weights are on all tokens; here the rest was recorded at other weights than those that are trained.
    rest = TERMS["decoupled" if ratio == "decoupled" else "detached"]
    expected = gradient_norm(loss_of(rows, plain_model, TERMS[ratio], on_the_rest=rest), plain_model)
    assert metrics["actor/grad_norm"] == pytest.approx(expected, rel=1e-4)
    another = "behavior" if ratio != "behavior" else "detached"
    different = gradient_norm(loss_of(rows, plain_model, TERMS[another]), plain_model)
    assert metrics["actor/grad_norm"] != pytest.approx(different, rel=1e-3)


@pytest.mark.parametrize("ratio", TAKES_NO_RATIO)
def test_demonstrations_have_the_gradient_of_their_formula(
    ratio: str, composed: Any, store: Store, plain_model: torch.nn.Module
) -> None:
    metrics, rows = run(composed, store, *DATASET, f"algorithm.soup.ratio={ratio}")
    expected = gradient_norm(loss_of(rows, plain_model, TERMS[ratio]), plain_model)
    assert metrics["actor/grad_norm"] == pytest.approx(expected, rel=1e-4)
    for another in set(TAKES_NO_RATIO) - {ratio}:
        different = gradient_norm(loss_of(rows, plain_model, TERMS[another]), plain_model)
        assert metrics["actor/grad_norm"] != pytest.approx(different, rel=1e-3)
    # Never spliced: the log-probs are the trainer's, and not the zeros that came with the demonstration.
    for row, pi in zip(rows, log_probs_of(rows, plain_model), strict=True):
        shown = row["policy_versions"] == NOBODY
        assert torch.allclose(row["old_log_probs"][shown].double(), pi[shown].detach(), atol=1e-5)
    assert metrics["soup/train/prefix/tokens"] == 0 < metrics["soup/train/demonstration/tokens"]
    assert metrics["soup/train/demonstration/tokens"] == metrics["soup/loss/prefix/tokens"]


def test_a_demonstration_may_be_context_only(composed: Any, store: Store, plain_model: torch.nn.Module) -> None:
    metrics, rows = run(composed, store, *DATASET, "algorithm.soup.ratio=nll", "algorithm.soup.prefix_gradient=0")
    expected = gradient_norm(loss_of(rows, plain_model, TERMS["nll"], trained_by(no_prefix_token, rows)), plain_model)
    assert metrics["actor/grad_norm"] == pytest.approx(expected, rel=1e-4)


def kept_by(gate: str, rows: Rows) -> list[bool]:
    """Prompt by prompt: whether any sample without a demonstration succeeded."""
    shown = [bool((row["policy_versions"] == NOBODY).any()) for row in rows]
    solved = {
        row["uid"]
        for row, demonstration in zip(rows, shown, strict=True)
        if not demonstration and row["rm_scores"].sum() > 0
    }
    if gate == "unsolved":
        return [not (demonstration and row["uid"] in solved) for row, demonstration in zip(rows, shown, strict=True)]
    return [demonstration != (row["uid"] in solved) for row, demonstration in zip(rows, shown, strict=True)]


@pytest.mark.parametrize(
    "settings",
    [
        ["algorithm.soup.demonstrations.gate=unsolved", "algorithm.soup.ratio=luffy"],
        ["algorithm.soup.demonstrations.gate=successes", "algorithm.soup.ratio=nll",
         "algorithm.soup.prefix_length.distribution=whole"],
    ],
)  # fmt: skip
def test_a_gate_leaves_samples_out_of_loss_and_baseline(
    settings: list[str], composed: Any, store: Store, plain_model: torch.nn.Module
) -> None:
    metrics, rows = run(composed, store, *DATASET, *settings)
    kept = kept_by(settings[0].partition("gate=")[2], rows)
    assert 0 < sum(kept) < len(rows)
    assert metrics["soup/train/demonstration/left_out"] == len(rows) - sum(kept)
    counted = [row for row, counts in zip(rows, kept, strict=True) if counts]
    for row, counts in zip(rows, kept, strict=True):
        assert row["response_mask"].tolist() == row["loss_mask"].tolist() == [int(counts)] * len(row["responses"])
        rewards = torch.stack([r["rm_scores"].sum() for r in counted if r["uid"] == row["uid"]])
        expected = (row["rm_scores"].sum() - rewards.mean()) / (rewards.std() + 1e-6) if counts else torch.zeros(())
        if len(rewards) > 1:
            assert torch.allclose(row["advantages"], expected, atol=1e-4)
    loss = loss_of(counted, plain_model, TERMS[settings[1].partition("ratio=")[2]])
    assert metrics["actor/grad_norm"] == pytest.approx(gradient_norm(loss, plain_model), rel=1e-4)


def test_the_prefix_may_have_a_clip_range_of_its_own(composed: Any, store: Store, plain_model: torch.nn.Module) -> None:
    wide = ["algorithm.soup.prefix_clip.low=inf", "algorithm.soup.prefix_clip.high=0.05"]
    metrics, rows = run(composed, store, *wide)
    term: Term = lambda pi, mu, a: clipped((pi - mu).exp(), a, torch.inf, 0.05)  # noqa: E731
    assert metrics["actor/grad_norm"] == pytest.approx(
        gradient_norm(loss_of(rows, plain_model, term), plain_model), 1e-4
    )
    assert metrics["soup/loss/prefix/clip_fraction/low"] == 0 < metrics["soup/loss/prefix/clip_fraction/high"]


def trained_by(choose: Callable[[Rows], list[torch.Tensor]], rows: Rows) -> list[torch.Tensor]:
    return [chosen.double() for chosen in choose(rows)]


def no_prefix_token(rows: Rows) -> list[torch.Tensor]:
    return [torch.zeros(len(row["responses"])) for row in rows]


def most_entropic_fifth(rows: Rows) -> list[torch.Tensor]:
    prefix = [row["policy_versions"] < STEP - 1 for row in rows]
    at = [(i, t) for i, p in enumerate(prefix) for t in p.nonzero()[:, 0].tolist()]
    # Ties (the first token of a prompt's samples) go by place.
    chosen = sorted(at, key=lambda place: -float(rows[place[0]]["entropy"][place[1]]))[: round(len(at) * 0.2)]
    left = [torch.zeros(len(row["responses"])) for row in rows]
    for i, t in chosen:
        left[i][t] = 1
    return left


def within_budget(rows: Rows) -> list[torch.Tensor]:
    """Leave out the largest square at which the advantage pushes further away, one at a time, until the mean fits."""
    prefix = [row["policy_versions"] < STEP - 1 for row in rows]
    left = [p.clone() for p in prefix]
    at = [(i, t) for i, p in enumerate(prefix) for t in p.nonzero()[:, 0].tolist()]
    # What the trainer computed stands where nothing was spliced; here it is recomputed by the model's own forward.
    log_ratio = {(i, t): float(rows[i]["log_ratio"][t]) for i, t in at}
    while at and sum(log_ratio[place] ** 2 for place in at) / len(at) > BUDGET:
        removable = [place for place in at if log_ratio[place] * float(rows[place[0]]["advantages"][place[1]]) > 0]
        if not removable:
            break
        worst = max(removable, key=lambda place: log_ratio[place] ** 2)
        at.remove(worst)
        left[worst[0]][worst[1]] = False
    return left


def add_log_ratios(rows: Rows, model: torch.nn.Module) -> None:
    for row, log_probs in zip(rows, log_probs_of(rows, model), strict=True):
        row["log_ratio"] = log_probs.detach() - row["rollout_log_probs"]


CHOICES = {
    "algorithm.soup.prefix_gradient=0": no_prefix_token,
    "algorithm.soup.prefix_gradient=0.2": most_entropic_fifth,
    f"algorithm.soup.second_moment={BUDGET}": within_budget,
}


@pytest.mark.parametrize("override", CHOICES)
def test_prefix_tokens_without_a_gradient_count_in_the_mean_unless_told_otherwise(
    override: str, composed: Any, store: Store, plain_model: torch.nn.Module
) -> None:
    metrics, rows = run(composed, store, override)
    add_log_ratios(rows, plain_model)
    weights = trained_by(CHOICES[override], rows)
    expected = gradient_norm(loss_of(rows, plain_model, TERMS["behavior"], weights), plain_model)
    assert metrics["actor/grad_norm"] == pytest.approx(expected, rel=1e-4)
    everything = gradient_norm(loss_of(rows, plain_model, TERMS["behavior"]), plain_model)
    assert metrics["actor/grad_norm"] != pytest.approx(everything, rel=1e-3)

    all_tokens = sum(len(row["responses"]) for row in rows)
    prefix = sum(int((row["policy_versions"] < STEP - 1).sum()) for row in rows)
    trained = sum(int(w[row["policy_versions"] < STEP - 1].sum()) for row, w in zip(rows, weights, strict=True))
    assert metrics["soup/train/prefix/trained"] == pytest.approx(trained / prefix)
    store.rows.clear()
    fewer, _ = run(composed, store, override, "algorithm.soup.loss_tokens=trained")
    counted = all_tokens - prefix + trained
    assert fewer["actor/grad_norm"] == pytest.approx(expected * all_tokens / counted, rel=1e-4)


BEHIND = {
    "product": lambda ratios: math.prod(ratios),
    "min": lambda ratios: min(ratios, default=1.0),
    "window": lambda ratios: min(
        max(math.prod(ratios), math.exp(-0.1 * len(ratios) ** 0.5)), math.exp(0.2 * len(ratios) ** 0.5)
    ),
}


@pytest.mark.parametrize("kind", BEHIND)
@pytest.mark.parametrize("ratio", ["behavior", "decoupled", "shaped"])
def test_what_comes_behind_a_prefix_is_weighed(
    kind: str, ratio: str, composed: Any, store: Store, plain_model: torch.nn.Module
) -> None:
    window = ["algorithm.soup.continuation_window.low=0.1", "algorithm.soup.continuation_window.high=0.2"]
    overrides = [f"algorithm.soup.ratio={ratio}", f"algorithm.soup.continuation_weight={kind}", *window]
    metrics, rows = run(composed, store, *overrides)
    add_log_ratios(rows, plain_model)
    behind = [BEHIND[kind](row["log_ratio"][row["policy_versions"] < STEP - 1].exp().tolist()) for row in rows]
    rest = TERMS["decoupled" if ratio == "decoupled" else "detached"]
    expected = gradient_norm(loss_of(rows, plain_model, TERMS[ratio], on_the_rest=rest, behind=behind), plain_model)
    assert metrics["actor/grad_norm"] == pytest.approx(expected, rel=1e-4)
    unweighed = gradient_norm(loss_of(rows, plain_model, TERMS[ratio], on_the_rest=rest), plain_model)
    assert metrics["actor/grad_norm"] != pytest.approx(unweighed, rel=1e-3)
    continued = [0 < int((row["policy_versions"] < STEP - 1).sum()) < len(row["responses"]) for row in rows]
    weights = [weight for weight, goes_on in zip(behind, continued, strict=True) if goes_on]
    assert metrics["soup/train/continuation/weight/mean"] == pytest.approx(sum(weights) / len(weights), rel=1e-5)
    assert metrics["soup/train/continuation/weight/max"] == pytest.approx(max(weights), rel=1e-5)
    assert (metrics["soup/train/continuation/weight/clipped"] > 0) == (kind == "window")


def running_product(pi: torch.Tensor, ratio: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """CTPO's objective of one response; `ratio` is a constant, the gradient goes through `pi`."""
    root = torch.arange(1, len(pi) + 1).sqrt()
    c = ratio.cumprod(0) * (pi - pi.detach()).exp()
    objective = torch.min(c * a, torch.min(torch.max(c, (-0.025 * root).exp()), (0.05 * root).exp()) * a)
    return torch.where(a < 0, torch.max(objective, (0.05 * root).exp() * a), objective)


def one_bound(all_ratios: torch.Tensor, all_a: torch.Tensor, budget: float) -> float:
    """M2PO's tau of a batch, by trying every one of a fine grid."""
    squares = all_ratios.log()[((all_ratios > 1) & (all_a > 0)) | ((all_ratios < 1) & (all_a < 0))] ** 2
    assert float(squares.mean()) > budget
    grid = torch.linspace(0, float(squares.max()) ** 0.5, 20_001, dtype=torch.float64)
    return max(float(tau) for tau in grid if float(squares.clip(max=float(tau) ** 2).mean()) <= budget)


@pytest.mark.parametrize("name", ["ctpo", "m2po"])
def test_published_losses_take_each_tokens_ratio_against_who_sampled_it(
    name: str, composed: Any, store: Store, plain_model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = 0.002  # of the recorded batch more than 0.04 is nowhere reached
    monkeypatch.setattr("verl_ext.policy_losses.M2PO_BUDGET", budget)
    whole = [f"{ACTOR}.ppo_micro_batch_size_per_gpu=64"]  # M2PO's bound is a micro-batch's
    config = composed(*COUNTDOWN, "algorithm=soup", ONE_MINI_BATCH, f"{ACTOR}.policy_loss.loss_mode={name}", *whole)
    trainer, metrics = make_trainer(SoupTrainer, config, WorkerGroup(config, store)), {}
    batch, rows = recorded(store), list(store.rows.values())
    for row in rows:  # old to the end: where the current policy samples, rounding decides which token is harmful
        row["policy_versions"] = torch.ones_like(row["policy_versions"])
    trainer._install_loss()
    batch = trainer._compute_advantage(trainer._compute_old_log_prob(batch, metrics), metrics)
    trainer._update_actor(batch, metrics)
    values, ratios = log_probs_of(rows, plain_model), []
    for row, pi in zip(rows, values, strict=True):
        ratios.append((pi.detach() - row["rollout_log_probs"].double()).exp())
    advantages = [row["advantages"].double() for row in rows]
    tau = one_bound(torch.cat(ratios), torch.cat(advantages), budget) if name == "m2po" else 0.0
    total = torch.zeros((), dtype=torch.float64)
    for pi, ratio, a in zip(values, ratios, advantages, strict=True):
        if name == "ctpo":
            total = total - running_product(pi, ratio, a).sum()
        else:
            moving = ratio * (pi - pi.detach()).exp()
            total = total - torch.min(moving * a, moving.clip(math.exp(-tau), math.exp(tau)) * a).sum()
    expected = gradient_norm(total / sum(map(len, values)), plain_model)
    assert metrics["actor/grad_norm"] == pytest.approx(expected, rel=1e-4)
    plain = gradient_norm(loss_of(rows, plain_model, TERMS["behavior"]), plain_model)
    assert metrics["actor/grad_norm"] != pytest.approx(plain, rel=1e-3)
    assert metrics["actor/pg_clipfrac"] > 0


def test_stale_negatives_have_no_gradient_behind_their_first_outlier(
    composed: Any, store: Store, plain_model: torch.nn.Module
) -> None:
    bounds = ["algorithm.soup.stale_negatives.low=0.9", "algorithm.soup.stale_negatives.high=1.1"]
    metrics, rows = run(composed, store, *bounds)
    add_log_ratios(rows, plain_model)
    kept, stopped = [], 0
    for row in rows:
        prefix, ratio = row["policy_versions"] < STEP - 1, row["log_ratio"].exp()
        outliers = (prefix & ((ratio < 0.9) | (ratio > 1.1))).nonzero()[:, 0].tolist()
        weights = torch.ones(len(ratio), dtype=torch.float64)
        if outliers and float(row["advantages"][0]) < 0:
            weights[outliers[0] + 1 :] = 0
        kept.append(weights)
        stopped += int((weights == 0).sum())
    behind = [float(weights[-1]) for weights in kept]  # what comes behind a prefix is stopped as a whole
    expected = gradient_norm(loss_of(rows, plain_model, TERMS["behavior"], kept, behind=behind), plain_model)
    assert metrics["actor/grad_norm"] == pytest.approx(expected, rel=1e-4)
    everything = gradient_norm(loss_of(rows, plain_model, TERMS["behavior"]), plain_model)
    assert metrics["actor/grad_norm"] != pytest.approx(everything, rel=1e-3)
    assert metrics["soup/train/stale_negatives/tokens"] == stopped > 0


def test_decoupled_weights_are_verls_truncated_ones(composed: Any, store: Store) -> None:
    _, rows = run(composed, store, "algorithm.soup.ratio=decoupled")
    for row in rows:
        assert torch.equal(
            row["rollout_is_weights"], (row["old_log_probs"] - row["rollout_log_probs"]).exp().clip(max=2)
        )
    assert max(float(row["rollout_is_weights"].max()) for row in rows) == 2.0


def test_no_kl_and_no_entropy_term_on_prefix_tokens_that_are_not_trained(composed: Any, store: Store) -> None:
    """With advantages of zero only these two terms are left."""
    norms = {}
    for loss_tokens in ("all", "trained"):
        overrides = ["algorithm.soup.prefix_gradient=0", f"algorithm.soup.loss_tokens={loss_tokens}"]
        metrics = update_split(composed, store, 32, *overrides, f"{ACTOR}.entropy_coeff=1e-2", constant=True)
        norms[loss_tokens] = metrics["actor/grad_norm"]
        tokens = metrics["soup/loss/prefix/tokens"]
        assert tokens == 0 if loss_tokens == "trained" else tokens > 0
    assert norms["all"] > 0
    assert norms["all"] != pytest.approx(norms["trained"], rel=1e-2)


# ---------------------------------------------------------------- verl's own options


def update_split(composed: Any, store: Store, micro_batch: int, *overrides: str, constant: bool = False) -> dict:
    """Metrics of an update of two mini-batches, in micro-batches of a given size."""
    store.rows.clear()
    config = composed(*COUNTDOWN, "algorithm=soup", *overrides, f"{ACTOR}.ppo_micro_batch_size_per_gpu={micro_batch}")
    torch.manual_seed(0)
    group = WorkerGroup(config, store)
    trainer = make_trainer(SoupTrainer, config, group)
    batch = recorded(store)
    if constant:
        for row in store.rows.values():
            row["rm_scores"] = torch.zeros_like(row["rm_scores"])
    trainer._install_loss()
    metrics: dict = {}
    batch = trainer._compute_old_log_prob(batch, metrics)
    for row in store.rows.values():  # a reference that is neither policy
        row["ref_log_prob"] = row["old_log_probs"] + 0.1 * torch.arange(len(row["old_log_probs"])).cos()
    batch = trainer._compute_advantage(batch, metrics)
    trainer._update_actor(batch, metrics)
    return metrics


DYNAMIC = ("token-mean", "seq-mean-token-mean", "weights")
OPTIONS = {
    "token-mean": [],
    "seq-mean-token-sum": [f"{ACTOR}.loss_agg_mode=seq-mean-token-sum"],
    "seq-mean-token-mean": [f"{ACTOR}.loss_agg_mode=seq-mean-token-mean"],
    "seq-mean-token-sum-norm": [f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm", f"{ACTOR}.loss_scale_factor=24"],
    "kl": [f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.kl_loss_coef=0.1"],
    "entropy": [f"{ACTOR}.entropy_coeff=0.01"],
    "two epochs": [f"{ACTOR}.ppo_epochs=2"],
    "lora": ["actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.target_modules=all-linear"],
    "weights": ["algorithm.soup.prefix_gradient=0.3", "algorithm.soup.loss_tokens=trained"],
    "shaped": ["algorithm.soup.ratio=shaped"],
}


@pytest.fixture(scope="module")
def default_norm() -> dict[str, float]:
    """Gradient norms by option, to see that each option does something."""
    return {}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_update_does_not_depend_on_how_a_mini_batch_is_split(
    option: str, composed: Any, store: Store, default_norm: dict[str, float]
) -> None:
    """Gradient accumulation: micro-batches of 32, and of 8 or at most 128 tokens (verl's dynamic batches)."""
    dynamic = [f"{ACTOR}.use_dynamic_bsz=true", f"{ACTOR}.ppo_max_token_len_per_gpu=128"]
    whole = update_split(composed, store, 32, *OPTIONS[option])
    split = update_split(composed, store, 8, *OPTIONS[option], *(dynamic if option in DYNAMIC else []))
    assert split["actor/grad_norm"] == pytest.approx(whole["actor/grad_norm"], rel=1e-4)
    for key in whole:
        if key.startswith(("soup/loss", "soup/train")):
            assert split[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6), key
    assert whole["actor/grad_norm"] not in default_norm.values()
    default_norm[option] = whole["actor/grad_norm"]


def test_the_examples_dynamic_batches_are_one_batch_as_before(composed: Any, store: Store) -> None:
    """The countdown example's mini-batch fits into the tokens of one micro-batch: the same numbers, bit by bit."""
    whole = update_split(composed, store, 32)
    dynamic = update_split(composed, store, 8, f"{ACTOR}.use_dynamic_bsz=true")
    for key in (key for key in whole if key.startswith(("soup/", "actor/")) and "perf" not in key):
        assert dynamic[key] == whole[key], key


def test_packed_sequences_give_the_same_update(composed: Any, store: Store) -> None:
    """verl's `use_remove_padding`."""
    padded = update_split(composed, store, 32)
    packed = update_split(composed, store, 32, "actor_rollout_ref.model.use_remove_padding=true")
    assert packed["actor/grad_norm"] == pytest.approx(padded["actor/grad_norm"], rel=1e-4)
    for key in (key for key in padded if key.startswith("soup/")):
        assert packed[key] == pytest.approx(padded[key], rel=1e-4, abs=1e-6), key


def test_permuting_a_mini_batch_changes_nothing_beyond_rounding(composed: Any, store: Store) -> None:
    config = composed(*COUNTDOWN, "algorithm=soup", ONE_MINI_BATCH)
    norms = []
    for order in (torch.arange(64), torch.randperm(64, generator=torch.Generator().manual_seed(1))):
        store.rows.clear()
        torch.manual_seed(0)
        trainer = make_trainer(SoupTrainer, config, WorkerGroup(config, store))
        batch = recorded(store)
        keys = [batch.keys[i] for i in order.tolist()]
        trainer._install_loss()
        metrics: dict = {}
        batch = KVBatchMeta(partition_id="train", keys=keys, tags=[store.tags[key] for key in keys], extra_info={})
        batch = trainer._compute_old_log_prob(batch, metrics)
        trainer._update_actor(trainer._compute_advantage(batch, metrics), metrics)
        norms.append(metrics["actor/grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


FUSED = "actor_rollout_ref.model.use_fused_kernels=true"


@pytest.mark.parametrize("packs", ["true", "false"])
def test_logits_in_pieces_give_the_same_update(
    packs: str, composed: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """verl's `use_fused_kernels`, on a model whose embedding is its head as well."""
    monkeypatch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)  # which verl replaces for good
    own = [f"actor_rollout_ref.model.use_remove_padding={packs}", f"+{TIED}=true"]
    whole = update_split(composed, store, 32, *own)
    pieces = update_split(composed, store, 32, *own, FUSED)
    assert pieces["actor/grad_norm"] == pytest.approx(whole["actor/grad_norm"], rel=1e-4)
    for key in (key for key in whole if key.startswith("soup/")):
        assert pieces[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6), key


def test_logits_in_pieces_want_a_head_that_is_the_embedding(
    composed: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """verl.models.transformers.dense_common.forward_with_torch_backend on fsdp2; `checks/model.py` refuses it."""
    monkeypatch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        update_split(composed, store, 32, FUSED)


def test_constant_rewards_change_no_weight(composed: Any, store: Store) -> None:
    metrics = update_split(composed, store, 32, constant=True)
    assert metrics["actor/grad_norm"] == 0


def test_two_ranks_give_the_gradient_and_the_metrics_of_one(tmp_path: Path, clean_environ: dict[str, str]) -> None:
    """Over gloo, by torchrun; the ranks' shares differ in tokens and prefixes, and so may their micro-batches."""
    script, results = Path(__file__).parents[3] / "support" / "two_ranks.py", []
    overrides = ["algorithm.soup.ratio=shaped", "algorithm.soup.prefix_gradient=0.7"]
    for ranks, batches in (("1", []), ("2", []), ("2", PADDED_TO_A_LIMIT)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        paths = [str(script.parent), *filter(None, [clean_environ.get("PYTHONPATH")])]
        environ = {**clean_environ, "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(
            [*command, str(script), str(tmp_path / "result"), *overrides, *batches],
            env=environ,
            capture_output=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        # The tensor and the numbers that the script wrote, and nothing else could be loaded.
        results.append(torch.load(tmp_path / "result", weights_only=True))
    one = results[0]
    assert one["gradient"].norm() > 0
    assert one["metrics"]["soup/loss/prefix/tokens"] > 100
    for two in results[1:]:
        assert torch.allclose(
            one["gradient"], two["gradient"], rtol=1e-4, atol=1e-6 * float(one["gradient"].abs().max())
        )
        assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-6)
    assert results[-1]["largest"] <= LIMIT


# ---------------------------------------------------------------- baselines


@pytest.mark.parametrize("estimator", ["soup", "grpo", "rloo"])
@pytest.mark.parametrize("baseline", ["group", "separate", "two_level"])
def test_each_baseline_reaches_the_update_with_verls_estimators(
    baseline: str, estimator: str, composed: Any, store: Store
) -> None:
    overrides = [f"algorithm.soup.baseline={baseline}", f"algorithm.adv_estimator={estimator}"]
    overrides += ["algorithm.soup.samples_per_prefix=2", "algorithm.norm_adv_by_std_in_grpo=false"]
    config = composed(*COUNTDOWN, "algorithm=soup", *overrides)
    group = StillWorkers(store)
    trainer = make_trainer(SoupTrainer, config, group)
    batch = recorded(store)
    # Samples 0 and 1, 2 and 3 of each prompt share the prefix of the first; 4 to 7 are pure.
    for key in batch.keys:
        row, sample = store.rows[key], int(key.rsplit("_", 2)[1])
        length = 4 if sample < 4 else 0
        first = store.rows[key.rsplit("_", 2)[0] + f"_{sample - sample % 2}_0"]
        size = min(length, len(row["responses"]), len(first["responses"]))
        row["responses"][:size] = first["responses"][:size]
        row["policy_versions"] = torch.where(torch.arange(len(row["responses"])) < size, 1, STEP - 1)
    trainer._compute_advantage(trainer._compute_old_log_prob(batch, {}), {})
    by_prompt: dict[str, list[dict]] = {}
    for key in batch.keys:
        by_prompt.setdefault(key.rsplit("_", 2)[0], []).append({"key": key, **store.rows[key]})
    for rows in by_prompt.values():
        check_prompt(rows, baseline, leave_one_out=estimator == "rloo")


def check_prompt(rows: list[dict], baseline: str, leave_one_out: bool) -> None:
    """Advantages of one prompt, from the definition: reward minus mean, of the others if `leave_one_out`."""

    def centred(value: float, values: list[float]) -> float:
        n = len(values)
        return (value - sum(values) / n) * (n / (n - 1) if leave_one_out else 1)

    reward = {row["key"]: float(row["rm_scores"].sum()) for row in rows}
    is_mixed = {row["key"]: bool((row["policy_versions"] < STEP - 1).any()) for row in rows}
    node = {row["key"]: tuple(row["responses"][row["policy_versions"] < STEP - 1].tolist()) for row in rows}
    value = {n: [reward[k] for k in reward if node[k] == n] for n in set(node.values())}
    means = {n: sum(values) / len(values) for n, values in value.items()}
    for row in rows:
        key, a = row["key"], row["advantages"]
        prefix = row["policy_versions"] < STEP - 1
        everyone = list(reward.values())
        if baseline == "group":
            expected = torch.full_like(a, centred(reward[key], everyone))
        elif baseline == "separate":
            like = [reward[k] for k in reward if is_mixed[k] == is_mixed[key]]
            expected = torch.full_like(a, centred(reward[key], like if len(like) > 1 else everyone))
        else:
            within = value[node[key]]
            expected = torch.full_like(a, centred(reward[key], within if len(within) > 1 else everyone))
            nodes = [means[n] for n in means if n]
            if len(nodes) > 1:
                expected[prefix] = centred(means[node[key]], nodes)
            else:
                expected[prefix] = sum(centred(r, everyone) for r in within) / len(within)
        assert torch.allclose(a, expected, atol=1e-5), (baseline, key)


def test_without_mixing_stale_tokens_enter_as_in_verl(composed: Any, store: Store) -> None:
    """Where weight syncs interrupt responses, the twin is verl's trainer and splices nothing."""
    config = composed(*COUNTDOWN, "algorithm=soup", "algorithm.soup.mixed_share=0")
    trainer = make_trainer(SoupTrainer, config, StillWorkers(store))
    trainer._compute_old_log_prob(recorded(store), {})
    assert any((row["policy_versions"] < STEP - 1).any() for row in store.rows.values())
    assert not any(row["old_log_probs"].any() for row in store.rows.values())  # the workers' zeros


def test_drop_in_estimators_see_the_recorded_batch_as_before(composed: Any, store: Store) -> None:
    """`group` leaves what verl computed in place, bit for bit."""
    advantages = []
    for baseline in ("algorithm.soup.mixed_share=0", "algorithm.soup.baseline=group"):
        store.rows.clear()
        trainer = make_trainer(SoupTrainer, composed(*COUNTDOWN, "algorithm=soup", baseline), StillWorkers(store))
        trainer._compute_advantage(trainer._compute_old_log_prob(recorded(store), {}), {})
        advantages.append({key: copy.deepcopy(row["advantages"]) for key, row in store.rows.items()})
    for key, values in advantages[0].items():
        assert torch.equal(values, advantages[1][key])
