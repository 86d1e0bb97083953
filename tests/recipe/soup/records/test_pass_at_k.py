"""pass@k against counting all the ways to draw."""

from itertools import combinations

import pytest

from recipe.soup.records.pass_at_k import pass_at_k


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_it_is_the_share_of_draws_with_a_correct_sample(samples: int) -> None:
    for correct in range(samples + 1):
        outcomes = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            draws = list(combinations(outcomes, k))
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 2, 5), (4, 5, 1), (4, 2, 0), (4, -1, 2)])
def test_what_is_not_defined_is_refused(samples: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(samples, correct, k)
