"""What steering does to the gradient, on a case in which every response is enumerated, in float64.

Responses have up to three tokens over {0, end}. The policy that sampled the stored ones, mu, is another than pi, which
is trained. A sample with a historical prefix has the gradient `sum_t r_t * d log pi(y_t) * A`, with r = pi/mu on the
prefix and 1 behind it. Without bias its expectation is 0 where A is a constant: nothing is to be learned from it.
"""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.steering import Steering, Stored
from recipe.soup.settings.steering import SteeringSettings

END, LONGEST = 1, 3
MU = torch.tensor([0.3, -0.4, 0.1], dtype=torch.float64)
"""Logit of the end at each place, of the policy that sampled what is stored."""
Response = tuple[int, ...]


def responses() -> list[Response]:
    return [(END,), (0, END), (0, 0, END), (0, 0, 0)]


def solved(response: Response) -> bool:
    return response in ((0, END), (0, 0, 0))


def log_probs(theta: torch.Tensor, response: Response) -> torch.Tensor:
    """(tokens,): of each token of a response."""
    ends = torch.nn.functional.logsigmoid(theta)
    goes_on = torch.nn.functional.logsigmoid(-theta)
    return torch.stack([ends[place] if token == END else goes_on[place] for place, token in enumerate(response)])


def continuations(prefix: Response) -> Iterator[Response]:
    return (response for response in responses() if response[: len(prefix)] == prefix and len(response) > len(prefix))


def stored(response: Response, visit: int = 0) -> Stored:
    ids = np.array(response, dtype=np.int32)
    values = log_probs(MU, response).float().numpy()
    return Stored(Prefix(ids, values, ((0, len(ids)),), True), visit, -1)


def of_random(length: int) -> dict[Response, float]:
    """Probability of each prefix of so many tokens; a response that ends before is complete."""
    found: dict[Response, float] = defaultdict(float)
    for response in responses():
        chance = log_probs(MU, response).sum().exp().item()
        ids = np.array(response)
        cut = Prefix.from_response(ids, np.zeros(len(ids)), np.zeros(len(ids), dtype=int), length, "keep")
        found[tuple(cut.token_ids.tolist())] += chance
    return found


def of_steering(help_given: float, select: bool = True) -> dict[Response, float]:
    """Probability of each prefix that is cut from one stored response, of any or of the outcome asked for."""
    found: dict[Response, float] = defaultdict(float)
    for response in responses():
        steering = Steering(SteeringSettings(limit=1.0))
        steering.prompts[0].help = help_given
        outcome = solved(response) if select else help_given > 0
        steering.store(0, outcome, stored(response))
        for prefix in steering.prefixes(0, 1, 1.0):
            found[tuple(prefix.token_ids.tolist())] += log_probs(MU, response).sum().exp().item()
    total = sum(found.values())
    return {prefix: chance / total for prefix, chance in found.items()}


def gradient(prefixes: dict[Response, float], constant: bool, part: str) -> torch.Tensor:
    """(parameters,): expectation over prefixes and over what pi writes behind them.

    Args:
        constant: whether the advantage is 1 for every sample, instead of 1 for those that are solved.
        part: `prefix` or `continuation`, the tokens that have a gradient.
    """
    theta = torch.tensor([-0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for prefix, chance in prefixes.items():
        for response in list(continuations(prefix)) or [prefix]:
            ours = log_probs(theta, response)
            split = len(prefix)
            likely = ours[split:].sum().exp().detach()
            ratio = (ours[:split] - log_probs(MU, response)[:split]).exp()  # its gradient is r * d log pi
            behind = (ours[split:] - ours[split:].detach()).exp()
            tokens = ratio if part == "prefix" else behind
            total = total + chance * likely * tokens.sum() * (1.0 if constant else float(solved(response)))
    total.backward()
    assert theta.grad is not None
    return theta.grad


@pytest.mark.parametrize("part", ["prefix", "continuation"])
@pytest.mark.parametrize("length", [1, 2])
def test_random_prefixes_of_a_length_that_knows_nothing_of_the_future_are_unbiased(length: int, part: str) -> None:
    assert gradient(of_random(length), constant=True, part=part).abs().max() < 1e-12


@pytest.mark.parametrize("help_given", [0.5, -0.5])
def test_a_prefix_of_a_chosen_outcome_is_imitated_even_where_nothing_is_to_be_learned(help_given: float) -> None:
    prefixes = of_steering(help_given)
    found = gradient(prefixes, constant=True, part="prefix")
    assert found.norm() > 0.05
    theta = torch.tensor([-0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    likely = sum(chance * log_probs(theta, prefix).sum() for prefix, chance in prefixes.items())
    assert isinstance(likely, torch.Tensor)
    likely.backward()
    assert theta.grad is not None
    assert float(found @ theta.grad) > 0  # the way of making these prefixes more probable


def test_a_cut_at_a_share_of_its_own_length_conditions_on_the_future_without_any_choice() -> None:
    every_response = of_steering(0.5, select=False)
    assert len(every_response) > 1
    assert gradient(every_response, constant=True, part="prefix").norm() > 0.05


@pytest.mark.parametrize("help_given", [0.5, -0.5])
def test_behind_a_steered_prefix_the_gradient_is_that_of_the_reward_given_the_prefix(help_given: float) -> None:
    """What `prefix_gradient=0` leaves."""
    prefixes = of_steering(help_given)
    assert gradient(prefixes, constant=True, part="continuation").abs().max() < 1e-12
    theta = torch.tensor([-0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    value = torch.zeros((), dtype=torch.float64)
    for prefix, chance in prefixes.items():
        for response in continuations(prefix):
            value = value + chance * log_probs(theta, response)[len(prefix) :].sum().exp() * float(solved(response))
    value.backward()
    assert theta.grad is not None
    assert torch.allclose(gradient(prefixes, constant=False, part="continuation"), theta.grad, atol=1e-12)
    assert theta.grad.norm() > 0.01
