"""The older name of the reward for mathematics, which users' configs hold: `pkg://recipe.soup.evaluate.math_reward`."""

from recipe.soup.mathematics.reward import compute_score

__all__ = ["compute_score"]
