"""`algorithm.soup.steering`: how `selection=steered` holds each prompt's solved share near one half."""

from typing import ClassVar, Literal

from recipe.soup.settings.group import Group, Number, Whole, key


class SteeringSettings(Group):
    """A controller for each prompt. AdaPrefix-GRPO, Prefix Sampling; the values are our prototype's."""

    path: ClassVar[str] = "algorithm.soup.steering"

    memory: Number = key(
        0.5,
        "Weight that a prompt's earlier visits keep in its solved share p, at each visit.",
        origin="AdaPrefix-GRPO steers the solved share of a group to one half; the value is our choice",
        ge=0,
        le=1,
        advice="a weight lies between 0 and 1.",
    )
    gain: Number = key(
        0.4,
        "How far help h moves at a visit: by `gain * (1/2 - p)`. Above 0 the prefix is that share of a successful "
        "response, below 0 of a failed one.",
        gt=0,
        advice="a controller needs a gain above 0.",
    )
    limit: Number = key(
        0.8,
        "Largest h of either sign, as a share of the response that the prefix is cut from.",
        gt=0,
        le=1,
        advice="a share lies above 0, up to 1.",
    )
    kept: Whole = key(
        4,
        "How many successes and how many failures of each prompt are stored, the last ones, at 8 bytes a token.",
        ge=1,
        advice="keep 1 or more.",
    )
    cut: Literal["fraction", "entropy"] = key(
        "fraction",
        "Where a stored response is cut: behind the share h of its tokens (`fraction`), or before the token at which "
        "the policy was least certain between a quarter and three quarters of it (`entropy`), whatever the size of h.",
        origin="`entropy`: PROS",
        when="`entropy` needs the trainer's forward pass. What `algorithm.filter_groups` evicts is stored as well, "
        "with the engine's log-probs, whatever `behavior_log_probs` says, and cut by its share.",
    )
    withdraw: Whole = key(
        0,
        "Over how many of the run's last steps h goes to 0, by cosine.",
        origin="AdaPrefix-GRPO withdraws its prefixes late",
        ge=0,
        advice="counts steps; use 0 or more.",
    )
