"""The keys of `algorithm.soup` that say how prefixes enter the loss."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from recipe.soup.settings.group import Group, Number, key

CLIPPED = ("behavior", "decoupled")
"""The ratios for which a clip range on the prefix has a meaning."""
TAKES_NO_RATIO = ("detached", "luffy", "nll")
"""The ratios that need no log-prob of the policy that sampled the prefix."""


class ClipSettings(Group):
    """Clip range of the ratio on the prefix, around 1. The paper does not say whether the prefix has its own."""

    low: Number | None = key(
        None,
        "How far below 1 the ratio on the prefix is clipped; null: verl's `clip_ratio_low`, as elsewhere; `inf`: not "
        "at all.",
        origin="our choice; the paper does not say whether the prefix has its own range",
        when="The dual clip (`actor.clip_ratio_c`) holds on both.",
        ge=0,
        advice="use 0 or more, inf for no clip.",
    )
    high: Number | None = key(
        None,
        "How far above 1 the ratio on the prefix is clipped; null: verl's `clip_ratio_high`, as elsewhere; `inf`: not "
        "at all.",
        origin="our choice; the paper does not say whether the prefix has its own range",
        when="Wide, if `soup/loss/prefix/clip_fraction` is high.",
        ge=0,
        advice="use 0 or more, inf for no clip.",
    )


class WindowSettings(Group):
    """How far from 0 the log of a weight may be, for each sqrt of the number of tokens that it is a product over."""

    low: Number = key(
        0.025,
        "With `continuation_weight=window`: behind a prefix of k tokens the log of the weight is at least "
        "`-low * sqrt(k)`; `inf`: any.",
        origin="CTPO's value",
        ge=0,
        advice="use 0 or more, inf for no bound.",
    )
    high: Number = key(
        0.05,
        "The same from above: at most `high * sqrt(k)`; `inf`: any.",
        origin="CTPO's value",
        ge=0,
        advice="use 0 or more, inf for no bound.",
    )


class StaleNegativeSettings(Group):
    """Bounds of pi_old/mu of a prefix token, beyond which a response with A < 0 teaches no further."""

    low: Number | None = key(
        None,
        "Where A < 0: behind the first prefix token whose ratio pi_old/mu is below this, no token has a gradient, none "
        "of the continuation either; null: no bound.",
        origin="mu-GRPO's rule; its bounds, which we have not found, and the ratio at the start of the update are our "
        "choice",
        when="Old or whole replayed responses, with `prefix_clip` `inf`: what the policy would no longer write need "
        "not be pushed away further. 0.5, for example.",
        gt=0,
        le=1,
        advice="use a ratio above 0 and up to 1, null for no bound.",
    )
    high: Number | None = key(
        None,
        "The same from above; null: no bound.",
        origin="as `low`",
        when="2, for example.",
        ge=1,
        advice="use a ratio of 1 or more, null for no bound.",
    )

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper bound; 0 and inf if there is none."""
        return 0.0 if self.low is None else self.low, math.inf if self.high is None else self.high


class LossSettings(Group):
    """Keys that stand at the top of `algorithm.soup`."""

    ratio: Literal["behavior", "decoupled", "detached", "shaped", "luffy", "nll"] = key(
        "behavior",
        "How the prefix enters the loss: one of the formulas in the table of ratios.",
        origin="paper: `behavior`, every token's ratio against the policy that sampled it",
        when="See the table of ratios. In the lab `decoupled` has the accuracy of `behavior` at lags 16 and 64, and "
        "less pass@16 at either (docs/study/results.md).",
    )
    shaping_gamma: Number = key(
        0.1,
        "The gamma in the formulas of `shaped` and `luffy`.",
        origin="LUFFY's value",
        gt=0,
        advice="r/(r+gamma) needs a number above 0.",
    )
    nll_coefficient: Number = key(
        1.0,
        "Weight of the log-likelihood with `ratio=nll`.",
        origin="UFT: 0.001",
        gt=0,
        advice="imitation needs a weight above 0.",
    )
    prefix_clip: ClipSettings = Field(default_factory=ClipSettings)
    prefix_gradient: Number = key(
        1.0,
        "Share of the batch's prefix tokens that have a policy gradient, those with the highest entropy first; 0: the "
        "prefix is only context.",
        origin="0: PrefixRL, Prefix Sampling; 0.2: Prefix-RFT",
        ge=0,
        le=1,
        advice="a share lies between 0 (none) and 1 (all).",
    )
    second_moment: Number | None = key(
        None,
        "Budget for the mean of (log pi_old/mu)^2 over prefix tokens: those that the update would push further away "
        "lose their gradient, the largest first, until the mean fits; null: no budget.",
        origin="after M2PO (0.04), which takes the mean over harmful tokens, in each micro-batch; as published it is "
        "`actor.policy_loss.loss_mode=m2po`",
        when="With `prefix_clip` `inf`; once for the batch, whatever it is split into.",
        gt=0,
        advice="a budget is above 0; null for none.",
    )
    stale_negatives: StaleNegativeSettings = Field(default_factory=StaleNegativeSettings)
    loss_tokens: Literal["all", "trained"] = key(
        "all",
        "What the loss is averaged over (verl's `loss_agg_mode`): `all` response tokens, or those that are `trained`, "
        "and then tokens without a gradient are left out of KL loss and entropy bonus as well.",
        when="With every token trained the two are the same: a token of the continuation weighs as much behind a long "
        "prefix as behind none.",
    )
    continuation_weight: Literal["none", "product", "min", "window", "whole"] = key(
        "none",
        "What the tokens behind a prefix weigh, since it is drawn as often as the historical policy writes it: 1 "
        "(`none`), the product of pi_old/mu over the prefix (`product`), the smallest of these ratios (`min`), or the "
        "product within `continuation_window` (`window`); computed once a step, and 1 without a prefix. `whole`: the "
        "product, and a prefix token weighs the ratios of the prefix's other tokens.",
        origin="our choice, the paper weighs no token by another's ratio; `min`: MinPRO; `window`: CTPO's bounds",
        when="`product` makes the continuation's gradient unbiased, `whole` the prefix's as well, but for clips; at a "
        "variance that grows with age and length: docs/after_the_prefix.md has both in numbers.",
    )
    continuation_window: WindowSettings = Field(default_factory=WindowSettings)
    baseline: Literal["group", "separate", "two_level"] = key(
        "group",
        "What a reward is compared with: all samples of the prompt (`group`), mixed with mixed and pure with pure "
        "(`separate`), or for prefix tokens what the other prefixes led to, and for all other tokens the samples that "
        "share the prefix (`two_level`); a sample alone in its group falls back to the prompt's.",
        origin="our choice; `group` as in GRPO",
        when="`separate`, if `soup/train/reward/mixed_minus_pure` is far from 0; `two_level` with `samples_per_prefix` "
        "of 2 or more.",
    )

    @model_validator(mode="after")
    def _check_clip(self) -> Self:
        clips, unset = self.ratio in CLIPPED, f"ratio={self.ratio} has no clip; drop it."
        self.demand("prefix_clip.low", clips or self.prefix_clip.low is None, unset)
        self.demand("prefix_clip.high", clips or self.prefix_clip.high is None, unset)
        knows = self.ratio not in TAKES_NO_RATIO or self.continuation_weight == "none"
        why = f"ratio={self.ratio} takes no ratio against the policy that sampled the prefix; use"
        self.demand("continuation_weight", knows, f"{why} none, or behavior as algorithm.soup.ratio.")
        for name, bound in (("low", self.stale_negatives.low), ("high", self.stale_negatives.high)):
            knows = self.ratio not in TAKES_NO_RATIO or bound is None
            self.demand(f"stale_negatives.{name}", knows, f"{why} null, or behavior as algorithm.soup.ratio.")
        return self
