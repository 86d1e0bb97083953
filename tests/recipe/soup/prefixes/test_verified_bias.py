"""What verification makes of the current policy, on a case in which every response is enumerated, in float64.

Responses have up to three tokens over {0, 1, end}. mu sampled the stored one; pi is the current policy. What comes out
is compared with pi in total variation: half of the sum of |differences| over all responses.
"""

import math
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest

from recipe.soup.prefixes.verification import accepted, drawn_from, residual

END, LONGEST, TOKENS = 2, 3, 3
Response = tuple[int, ...]
Policy = dict[Response, np.ndarray]
"""Log-probs of the next token, by what stands before it."""
Distribution = dict[Response, float]


def complete(response: Response) -> bool:
    return len(response) == LONGEST or response[-1:] == (END,)


def contexts(prefix: Response = ()) -> list[Response]:
    if complete(prefix):
        return []
    return [prefix, *(found for token in range(TOKENS) for found in contexts((*prefix, token)))]


def policy(logits: dict[Response, np.ndarray]) -> Policy:
    return {context: values - np.log(np.exp(values).sum()) for context, values in logits.items()}


def random_logits(seed: int, size: float) -> dict[Response, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {context: size * rng.normal(size=TOKENS) for context in contexts()}


def samples(of: Policy, prefix: Response = ()) -> Distribution:
    """Probability of each response that begins with this prefix, given it."""
    if complete(prefix):
        return {prefix: 1.0}
    found: Distribution = {}
    for token in range(TOKENS):
        for response, chance in samples(of, (*prefix, token)).items():
            found[response] = chance * math.exp(of[prefix][token])
    return found


def log_probs(of: Policy, response: Response) -> np.ndarray:
    return np.array([of[response[:place]][token] for place, token in enumerate(response)])


def acceptance(now: float, then: float, leniency: float) -> float:
    """The probability with which `accepted` keeps a token, found by halving where its draw turns."""
    low, high = 0.0, 1.0
    one = np.array([now]), np.array([then]), leniency
    if accepted(*one, np.array([np.nextafter(1.0, 0.0)])):
        return 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if accepted(*one, np.array([middle])) else (low, middle)
    return low


def verified(response: Response, pi: Policy, mu: Policy, leniency: float, exact: bool) -> Distribution:
    """What comes of one stored response."""
    found: Distribution = defaultdict(float)
    reached = 1.0
    now, then = log_probs(pi, response), log_probs(mu, response)
    for place in range(len(response)):
        keeps = acceptance(now[place], then[place], leniency)
        before = response[:place]
        instead = residual(pi[before], mu[before]) if exact else np.exp(pi[before])
        for token in range(TOKENS) if keeps < 1 else ():
            for whole, chance in samples(pi, (*before, token)).items():
                found[whole] += reached * (1 - keeps) * instead[token] * chance
        reached *= keeps
    found[response] += reached
    return found


def out_of(pi_of: Callable[[Response], Policy], mu: Policy, leniency: float, exact: bool) -> Distribution:
    """What comes out of verification in the mean over what mu may have stored.

    Args:
        pi_of: the current policy, given what was stored.
    """
    found: Distribution = defaultdict(float)
    for stored, chance in samples(mu).items():
        for response, then in verified(stored, pi_of(stored), mu, leniency, exact).items():
            found[response] += chance * then
    return found


def distance(one: Distribution, other: Distribution) -> float:
    return sum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in {*one, *other}) / 2


MU = random_logits(0, 1.0)
MOVED = {context: MU[context] + shift for context, shift in random_logits(1, 1.2).items()}
"""Logits of a policy that has moved from mu, whatever was stored."""


def off(leniency: float, exact: bool) -> float:
    pi, mu = policy(MOVED), policy(MU)
    return distance(out_of(lambda _: pi, mu, leniency, exact), samples(pi))


def test_with_the_residual_verification_samples_the_current_policy_exactly() -> None:
    assert distance(samples(policy(MU)), samples(policy(MOVED))) > 0.15  # there is something to be mended
    assert off(1.0, exact=True) < 1e-12


def test_without_it_even_leniency_1_is_off_and_more_leniency_is_further_off() -> None:
    distances = [off(leniency, exact=False) for leniency in (1.0, math.exp(0.5), math.inf)]
    assert distances == pytest.approx([0.0872, 0.1371, 0.1712], abs=1e-4)
    # With no limit the policy that stored is replayed.
    assert distances[2] == pytest.approx(distance(samples(policy(MU)), samples(policy(MOVED))))


def trained(stored: Response, rate: float = 1.0) -> Policy:
    """mu after a step of REINFORCE on the stored response, whose advantage is 1 if it has an even sum, else -1."""
    advantage = 1.0 if sum(token for token in stored if token != END) % 2 == 0 else -1.0
    logits = {context: values.copy() for context, values in MU.items()}
    for place, token in enumerate(stored):
        context = stored[:place]
        logits[context] += rate * advantage * (np.eye(TOKENS)[token] - np.exp(policy(MU)[context]))
    return policy(logits)


def test_what_the_weights_were_trained_on_is_biased_even_with_the_residual() -> None:
    """A fresh sample of the trained policy is one of the mean over weights of pi; a verified one is not."""
    mu = policy(MU)
    fresh: Distribution = defaultdict(float)
    for stored, chance in samples(mu).items():
        for response, then in samples(trained(stored)).items():
            fresh[response] += chance * then
    assert distance(out_of(trained, mu, 1.0, exact=True), fresh) == pytest.approx(0.1227, abs=1e-4)
    # The same weights with a response that they were not trained on: nothing is wrong with the rule.
    for seen in samples(mu):
        independent = out_of(lambda _, seen=seen: trained(seen), mu, 1.0, exact=True)
        assert distance(independent, samples(trained(seen))) < 1e-12


def test_a_draw_at_the_end_of_the_residual_is_still_one_of_its_tokens() -> None:
    found = residual(np.log([0.5, 0.3, 0.2]), np.log([0.2, 0.2, 0.6]))
    assert found == pytest.approx([0.75, 0.25, 0.0])
    assert [drawn_from(found, draw) for draw in (0.0, 0.74, 0.76, np.nextafter(1.0, 0.0), 1.0)] == [0, 0, 1, 1, 1]


def test_where_both_policies_are_equal_the_residual_is_the_policy() -> None:
    same = np.log([0.5, 0.3, 0.2])
    assert residual(same, same) == pytest.approx([0.5, 0.3, 0.2])
