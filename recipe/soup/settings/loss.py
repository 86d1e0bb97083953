"""The keys of `algorithm.soup` that say how prefixes enter the loss."""

from typing import Literal, Self

from pydantic import Field, model_validator

from recipe.soup.settings.group import Group, Number, key

CLIPPED = ("behavior", "decoupled")
"""The ratios for which a clip range on the prefix has a meaning."""


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


class LossSettings(Group):
    """Keys that stand at the top of `algorithm.soup`."""

    ratio: Literal["behavior", "decoupled", "detached", "shaped", "luffy", "nll"] = key(
        "behavior",
        "How the prefix enters the loss: one of the formulas in the table of ratios.",
        origin="paper: `behavior`, every token's ratio against the policy that sampled it",
        when="See the table of ratios.",
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
        origin="M2PO (0.04)",
        when="With `prefix_clip` `inf`.",
        gt=0,
        advice="a budget is above 0; null for none.",
    )
    loss_tokens: Literal["all", "trained"] = key(
        "all",
        "What the loss is averaged over (verl's `loss_agg_mode`): `all` response tokens, or those that are `trained`, "
        "and then prefix tokens without a gradient are left out of KL loss and entropy bonus as well.",
        when="With every token trained the two are the same: a token of the continuation weighs as much behind a long "
        "prefix as behind none.",
    )
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
        return self
