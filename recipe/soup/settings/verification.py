"""`algorithm.soup.verification`: how `selection=verified` keeps what the current policy accepts of old responses."""

from typing import ClassVar, Literal

from recipe.soup.settings.group import Group, Number, key


class VerificationSettings(Group):
    """SPEC-RL: a token of an old response is kept with probability min(1, `leniency` pi/mu)."""

    path: ClassVar[str] = "algorithm.soup.verification"

    leniency: Number = key(
        1.6487,
        "The l of min(1, l pi/mu), with which a token is kept that mu sampled and pi is to go on from; the first one "
        "that is not kept ends the prefix.",
        origin="SPEC-RL: e^0.5",
        when="1 for the rule of speculative sampling. The larger, the more tokens are saved, and the further what is "
        "kept is from a sample of the current policy; inf keeps all (trajectories of the last visit, as if they were "
        "new).",
        gt=0,
        advice="a leniency lies above 0; 1 is the rule of speculative sampling.",
    )
    rejected: Literal["sampled", "residual"] = key(
        "sampled",
        "What comes in a rejected token's place: whatever the current policy samples (`sampled`), or a token from the "
        "normalised (pi - mu)_+ (`residual`), with which a kept response is an exact sample of the current policy, if "
        "its weights do not depend on the response.",
        origin="`sampled`: SPEC-RL; `residual`: speculative sampling",
        when="`residual` stores mu of the whole vocabulary at every token, so it is for the lab with a toy, and for "
        "`leniency=1`: to tell what `sampled` costs.",
    )
