"""Computes the tables of docs/after_the_prefix.md: bias and variance of each weight behind a stale prefix.

Every response is enumerated: up to six tokens out of four, of which one ends it. A small policy is trained on sampled
responses; mu is what it was some updates ago. Then, in float64 and without sampling, for a mixed sample whose prefix is
drawn by mu: the expectation of its gradient, compared with the exact gradient of the expected reward, and its variance.

Example:
    python -m benchmarks.after_the_prefix    # writes the tables anew
"""

import math
import re
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch

from recipe.soup.algorithm.continuation_weights import continuation_weights, others_on_the_prefix
from recipe.soup.algorithm.losses.clipped import clipped
from recipe.soup.algorithm.losses.inputs import Clip, LossInputs

PAGE = Path(__file__).parents[1] / "docs/after_the_prefix.md"
MARKED = re.compile(r"(<!-- table -->\n\n).*?(\n<!-- end of table -->)", re.DOTALL)
END, TOKENS, LONGEST, SUM = 3, 4, 6, 5
"""The digits 0, 1, 2 and the end; solved is what ends and whose digits add up to `SUM`."""
PREFIXES = (1, 2, 3)
"""Lengths, drawn evenly: up to half of the longest response, as by default."""
LAGS, UPDATES, SEEDS = (1, 16, 64), 256, 8
SAMPLES, RATE = 64, 0.4
"""Of an update while training, and its learning rate (plain gradient ascent)."""
WINDOW = (0.025, 0.05)
NO_CLIP = Clip(math.inf, math.inf, math.inf, math.inf, math.inf)


def enumerated() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every response: tokens (responses, LONGEST), which of them there are, and the reward of each response."""
    digits = range(END)
    ended = [(*body, END) for length in range(LONGEST) for body in product(digits, repeat=length)]
    every = ended + list(product(digits, repeat=LONGEST))
    tokens = torch.tensor([response + (END,) * (LONGEST - len(response)) for response in every])
    mask = torch.arange(LONGEST) < torch.tensor([len(response) for response in every])[:, None]
    solved = [float(response[-1] == END and sum(response[:-1]) == SUM) for response in every]
    return tokens, mask, torch.tensor(solved, dtype=torch.float64)


RESPONSES, MASK, REWARDS = enumerated()
# The end stands for "nothing yet" before the first token.
BEFORE = torch.cat([torch.full_like(RESPONSES[:, :1], END), RESPONSES[:, :-1]], dim=1)
PLACE = torch.arange(LONGEST).expand_as(RESPONSES)


def log_probs(theta: torch.Tensor) -> torch.Tensor:
    """(responses, LONGEST): of each token, 0 behind the end; `theta` has a logit by place, token before, and token."""
    return torch.where(MASK, theta.log_softmax(-1)[PLACE, BEFORE, RESPONSES], 0.0)


def scores(theta: torch.Tensor) -> torch.Tensor:
    """(responses, LONGEST, TOKENS): gradient of each token's log-prob, by its state's logits."""
    of_state = torch.eye(TOKENS, dtype=torch.float64)[RESPONSES] - theta.softmax(-1)[PLACE, BEFORE]
    return of_state * MASK[..., None]


def gradient(score: torch.Tensor, of_tokens: torch.Tensor) -> torch.Tensor:
    """Like `theta`: the sum of all tokens' scores, each times its number in `of_tokens` (responses, LONGEST)."""
    total = torch.zeros(LONGEST, TOKENS, TOKENS, dtype=torch.float64)
    return total.index_put((PLACE, BEFORE), score * of_tokens[..., None], accumulate=True)


def trained(seed: int) -> list[torch.Tensor]:
    """The policy after 0 to UPDATES updates on samples of its own, each with the exact mean reward as baseline."""
    rng = np.random.default_rng(seed)
    theta = torch.zeros(LONGEST, TOKENS, TOKENS, dtype=torch.float64)
    history = [theta]
    for _ in range(UPDATES):
        theta = theta.detach().requires_grad_()
        log_chance = log_probs(theta).sum(1)
        chance = log_chance.detach().exp()
        drawn = np.searchsorted(chance.cumsum(0).numpy(), rng.random(SAMPLES) * float(chance.sum()))
        advantages = REWARDS - chance @ REWARDS
        (step,) = torch.autograd.grad((log_chance * advantages)[drawn].mean(), theta)
        theta = (theta + RATE * step).detach()
        history.append(theta)
    return history


def token_weights(theta: torch.Tensor, mu: torch.Tensor, length: int, how: str) -> torch.Tensor:
    """(responses, LONGEST): by what each token's A grad log pi is multiplied, if its prefix has `length` tokens.

    SOUP's own loss at the start of an update, without a clip; and `running`: every token by the product of all ratios
    up to it.
    """
    log_pi, log_mu = log_probs(theta), log_probs(mu)
    prefix = (torch.arange(LONGEST) < length) & MASK
    log_ratio = torch.where(prefix, log_pi - log_mu, 0.0)
    if how == "running":
        return log_ratio.cumsum(1).exp()
    current = log_pi.clone().requires_grad_()
    inputs = LossInputs(current, torch.where(prefix, log_mu, log_pi), torch.ones_like(log_pi), prefix, NO_CLIP)
    clipped(inputs).losses.sum().backward()
    assert current.grad is not None
    if how == "none":
        return -current.grad
    behind, _ = continuation_weights(log_ratio, prefix, how, WINDOW)
    on_prefix = others_on_the_prefix(log_ratio, prefix) if how == "whole" else torch.ones_like(log_pi)
    return -current.grad * torch.where(prefix, on_prefix, behind[:, None])


@dataclass(frozen=True)
class Figures:
    """Of one way of weighing; everything in units of the exact gradient's norm.

    Attributes:
        bias, prefix_bias, continuation_bias: norm of (expectation - exact gradient), of all tokens and by segment.
        variance: of one sample's gradient, summed over parameters; in units of the squared norm.
    """

    bias: float
    prefix_bias: float
    continuation_bias: float
    variance: float


def figures(theta: torch.Tensor, mu: torch.Tensor, how: str, lengths: tuple[int, ...] = PREFIXES) -> Figures:
    """Expectation and variance over prefixes of each length, what mu writes there, and what pi writes behind."""
    log_pi, log_mu, score = log_probs(theta), log_probs(mu), scores(theta)
    on_policy = log_pi.sum(1).exp()
    advantages = (REWARDS - on_policy @ REWARDS)[:, None]
    wanted = (on_policy[:, None] * advantages).expand_as(log_pi)
    exact = gradient(score, wanted)
    off = {"prefix": torch.zeros_like(exact), "continuation": torch.zeros_like(exact)}
    second = 0.0
    for length in lengths:
        prefix = torch.arange(LONGEST) < length
        chance = torch.where(prefix, log_mu, log_pi).sum(1).exp()
        weights = token_weights(theta, mu, length, how) * advantages
        for name, segment in (("prefix", prefix), ("continuation", ~prefix)):
            off[name] += gradient(score, (chance[:, None] * weights - wanted) * segment) / len(lengths)
        # A response meets each state once, so that the scores of its tokens are at right angles.
        second += float(chance @ (weights[..., None] * score).pow(2).sum((1, 2))) / len(lengths)
    bias = off["prefix"] + off["continuation"]
    unit = float(exact.norm())
    variance = second - float((exact + bias).pow(2).sum())
    parts = [float(part.norm()) / unit for part in (bias, off["prefix"], off["continuation"])]
    return Figures(parts[0], parts[1], parts[2], variance / unit**2)


WAYS = {
    "none": "`none`",
    "min": "`min`",
    "window": "`window`",
    "product": "`product`",
    "running": "running",
    "whole": "`whole`",
}


def drift(theta: torch.Tensor, mu: torch.Tensor) -> float:
    """Mean |log pi - log mu| of a prefix token that mu samples, in nats (`soup/train/prefix/drift/mean`)."""
    log_pi, log_mu = log_probs(theta), log_probs(mu)
    chance, prefix = log_mu.sum(1).exp(), MASK & (torch.arange(LONGEST) < max(PREFIXES))
    moved = ((log_pi - log_mu).abs() * prefix).sum(1)
    return float(chance @ moved) / float(chance @ prefix.sum(1).double())


def over_seeds(runs: list[list[torch.Tensor]], lag: int, how: str, lengths: tuple[int, ...] = PREFIXES) -> Figures:
    """Means over the runs."""
    found = [astuple(figures(run[-1], run[-1 - lag], how, lengths)) for run in runs]
    return Figures(*np.mean(found, axis=0))


def tables() -> str:
    """All of it, as Markdown: means over the seeds."""
    runs = [trained(seed) for seed in range(SEEDS)]
    first, last = (np.mean([float(log_probs(run[at]).sum(1).exp() @ REWARDS) for run in runs]) for at in (0, -1))
    lines = [
        f"Solved by the policy: {first:.2f} before the first update, {last:.2f} after {UPDATES}.",
        "",
        "| lag | drift, nats | weights | bias | of the prefix | of the continuation | variance | better than `none` |",
        "|---|---|---|---|---|---|---|---|",
        f"| 0 | 0 | any | 0 | 0 | 0 | {over_seeds(runs, 0, 'none').variance:.1f} | |",
    ]
    for lag in LAGS:
        moved = np.mean([drift(run[-1], run[-1 - lag]) for run in runs])
        plain = over_seeds(runs, lag, "none")
        for how, said in WAYS.items():
            own = over_seeds(runs, lag, how)
            parts = " | ".join(map(_small, (own.bias, own.prefix_bias, own.continuation_bias)))
            better = _from(own, plain) if how != "none" else ""
            lines.append(f"| {lag} | {moved:.3f} | {said} | {parts} | {own.variance:.1f} | {better} |")
    lag = LAGS[-1]
    lines += ["", f"With lag {lag} and prefixes of one length:", "", BY_LENGTH]
    for length in range(1, LONGEST):
        two = [over_seeds(runs, lag, how, (length,)) for how in ("none", "product", "whole")]
        biases, variances = [_small(of.bias) for of in two[:2]], [f"{of.variance:.1f}" for of in two]
        lines.append(f"| {length} | {' | '.join(biases + variances)} |")
    return "\n".join(lines) + "\n"


BY_LENGTH = """| prefix, tokens | bias of `none` | of `product` | variance of `none` | of `product` | of `whole` |
|---|---|---|---|---|---|"""


def _small(value: float) -> str:
    return "0" if value < 1e-9 else f"{value:.3f}"


def _from(own: Figures, plain: Figures) -> str:
    """From how many samples on the mean squared error, bias^2 + variance / samples, is smaller."""
    gained, lost = plain.bias**2 - own.bias**2, own.variance - plain.variance
    if gained <= 0:
        return "never" if lost >= 0 or gained == 0 else f"below {math.ceil(lost / gained):,} samples"
    return "always" if lost <= 0 else f"from {math.ceil(lost / gained):,} samples on"


def with_tables(page: str) -> str:
    """The page with its tables made anew."""
    return MARKED.sub(lambda found: f"{found[1]}{tables()}{found[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
