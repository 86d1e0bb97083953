"""The ratios by name (`algorithm.soup.ratio`).

A new one is a function from `LossInputs` to `LossOutputs`, and one line here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from recipe.soup.algorithm.losses.clipped import clipped, detached
from recipe.soup.algorithm.losses.inputs import LossInputs, LossOutputs
from recipe.soup.algorithm.losses.nll import nll
from recipe.soup.algorithm.losses.shaped import luffy, shaped


@dataclass(frozen=True)
class Ratio:
    """How historical tokens enter the loss.

    Attributes:
        loss: of each token.
        splices: whether prefix tokens enter with the log-probs of the policy that sampled them; if not, with the
            current policy's, and a weight corrects for the difference.
        clips_prefix: whether a clip range on the prefix has a meaning.
    """

    loss: Callable[[LossInputs], LossOutputs]
    splices: bool = True
    clips_prefix: bool = True


RATIOS: dict[str, Ratio] = {
    "behavior": Ratio(clipped),
    # The weight is verl's `algorithm.rollout_correction.rollout_is`.
    "decoupled": Ratio(clipped, splices=False),
    "detached": Ratio(detached, clips_prefix=False),
    "shaped": Ratio(shaped, clips_prefix=False),
    "luffy": Ratio(luffy, clips_prefix=False),
    "nll": Ratio(nll, clips_prefix=False),
}
