"""The keys of `algorithm.soup` that say which prefixes there are, and when."""

from typing import Literal, Self

from pydantic import Field, model_validator

from recipe.soup.settings.demonstrations import DemonstrationSettings
from recipe.soup.settings.group import Group, Number, Whole, key
from recipe.soup.settings.prefix_length import PrefixLengthSettings
from recipe.soup.settings.schedules import Schedules
from recipe.soup.settings.snapshot import POLICIES, SnapshotSettings
from recipe.soup.settings.steering import SteeringSettings
from recipe.soup.settings.verification import VerificationSettings


class PrefixSettings(Group):
    """Keys that stand at the top of `algorithm.soup`."""

    source: Literal["lookahead", "snapshot", "replay", "dataset"] = key(
        "lookahead",
        "Where prefixes come from: sampled `lag` updates before their prompt is trained on, by the engine that serves "
        "the current policy (`lookahead`), sampled by kept weights in an engine of their own (`snapshot`), cut from "
        "the responses of the prompt's last visit (`replay`), or demonstrations from a column of the data (`dataset`).",
        origin="paper: an earlier checkpoint",
        when="See the table of sources.",
    )
    lag: Whole = key(
        16,
        "Age of the historical policy in updates; 0 is GRPO, and a lag longer than the run is only a longer warm "
        "start.",
        when="The longer, the more of the old diversity comes back, and the further ratios are from 1: in our study "
        "(docs/study) 16 kept GRPO's accuracy, and 64 more of the diversity at a little less accuracy. Where groups "
        "are refilled (`algorithm.filter_groups`), a step takes more prompts, which are then younger than `lag`; each "
        "token's version stays exact, and `soup/train/prefix/lag` shows the age.",
        ge=0,
        advice="a lag counts updates back in time; use 0 or more.",
    )
    lag_distribution: Literal["fixed", "uniform", "geometric"] = key(
        "fixed",
        "How a prefix's lag is drawn, per prompt with `lookahead`, per step with `snapshot`: always `lag` (`fixed`), "
        "from 1 to `lag` (`uniform`), or the same with a probability that halves every quarter of `lag` "
        "(`geometric`).",
        when="A pool of past policies rather than one.",
    )
    max_age: Whole | None = key(
        None,
        "Prefixes with a token that is more than so many updates old are dropped when their prompt's turn comes, and "
        "counted (`soup/cost/too_old`); their samples are pure. null: none is too old.",
        when="With `replay`, whose prefixes are as old as the prompt's last visit, or older where they were replayed "
        "themselves; with `snapshot.policy=pool`.",
        ge=1,
        advice="a historical prefix is 1 update old or more; null for no limit.",
    )
    mixed_share: Number = key(
        0.5,
        "Share of each prompt's samples that start with a historical prefix: `n * mixed_share` of them, a fraction of "
        "one being drawn; 0 is GRPO.",
        ge=0,
        le=1,
        advice="a share lies between 0 and 1.",
    )
    samples_per_prefix: Whole = key(
        1,
        "How many samples of a prompt continue the same prefix (a divisor of `rollout.n`).",
        when="More for fewer requests, and for `baseline=two_level`; a shared prefix that is complete "
        "(`on_eos=keep`) makes equal samples.",
        ge=1,
        advice="a prefix has one sample or more.",
    )
    prefix_length: PrefixLengthSettings = Field(default_factory=PrefixLengthSettings)
    selection: Literal["random", "failed", "successful", "certain", "entropic", "steered", "verified"] = key(
        "random",
        "Which of the available prefixes is used: any (`random`), of a response with a reward of 0 or less (`failed`) "
        "or above 0 (`successful`), of these the one with the smallest mean -log-prob, where not all of a prompt's "
        "samples are solved (`certain`), the one with the largest (`entropic`; with `replay`, of the whole response), "
        "what brings the prompt's solved share to one half (`steered`, see `steering`), or of any response "
        "the first tokens that the current policy accepts (`verified`, see `verification`).",
        origin='our choice, for the question "what to seed?"',
        when="`failed`, `successful`, `certain` and `steered` are for `replay` only, since a prefix has no reward "
        "before its response is complete, and so is `verified`, which needs whole responses. A chosen prefix is no "
        "longer a plain sample of its policy: ratios correct the policy, not the choice, so all but `random` add "
        "a bias. `steered` also cuts at a share of a response's own length, which conditions on the future as "
        "`on_eos=cut` does; with `prefix_gradient=0` the continuation's gradient is unbiased for the reward given the "
        "prefix. Tokens of `verified` count as the current policy's, without a ratio (docs/verified_replay.md).",
    )
    candidates: Whole = key(
        1,
        "How many prefixes are sampled for each one that `selection=entropic` uses; `replay` samples none, and chooses "
        "among the last visit's responses.",
        ge=1,
        advice="sample at least 1.",
    )
    schedules: Schedules = Field(default_factory=Schedules)
    warm_start: Literal["pure", "fill", "ramp"] = key(
        "ramp",
        "What step t does before version t-1-lag exists: it does not mix (`pure`), it takes version 0, from which the "
        "first `lag` steps are seeded in one burst (`fill`), or it takes a lag that grows by one every other step, "
        "without a burst (`ramp`).",
    )
    on_eos: Literal["keep", "cut"] = key(
        "keep",
        "What becomes of a prefix in which the response ended: it is a complete sample (`keep`), or its end token is "
        "dropped and the current policy goes on (`cut`).",
        origin="our choice; `cut` is closer to the paper's words",
        when="`keep` adds no bias, since the length is a stopping time; `cut` conditions on the future and biases "
        "the estimate. (What any old prefix biases, `continuation_weight` is for.) Ends are found by where the engine "
        "stopped, not by a token id.",
    )
    behavior_log_probs: Literal["auto", "rollout", "trainer"] = key(
        "auto",
        "Who computes mu on the prefix: the engine that sampled it (`rollout`), the trainer, once, while it holds the "
        "weights that sampled (`trainer`), or the trainer where it can and where the two round differently (`auto`).",
        when="`trainer` costs one forward pass over prompt and prefix (with `replay` none), and leaves no mismatch "
        "between engine and trainer in the ratios, which is large with low precision or MoE; "
        "`soup/prefix/engine_mismatch` says how far the engine was off. Not with `snapshot`.",
    )
    resume_bank: Literal["strict", "fresh"] = key(
        "strict",
        "What becomes of a checkpoint's prefixes: they are used as far as they fit, and what cannot be used at all is "
        "refused (`strict`), or they are left out, with past weights and controllers, and the run goes on with nothing "
        "but its weights and its place in the data (`fresh`).",
        when="`fresh` to go on with another source or selection, or from a checkpoint whose prefixes are lost; it "
        "holds whenever the run goes on again, so take it out then. What each change does: docs/run.md.",
    )
    demonstrations: DemonstrationSettings = Field(default_factory=DemonstrationSettings)
    steering: SteeringSettings = Field(default_factory=SteeringSettings)
    verification: VerificationSettings = Field(default_factory=VerificationSettings)
    snapshot: SnapshotSettings = Field(default_factory=SnapshotSettings)

    @property
    def mixes(self) -> bool:
        """Whether a run with these settings ever trains on a prefix."""
        by_lag = self.source == "lookahead" or (self.source == "snapshot" and self.snapshot.policy == "lagged")
        shares = (self.mixed_share, self.schedules.mixed_share.end or 0)
        return max(shares) > 0 and (self.largest_lag > 0 or not by_lag)

    @property
    def demonstrates(self) -> bool:
        """Whether prefixes are of a data set."""
        return self.mixes and self.source == "dataset"

    @property
    def verifies(self) -> bool:
        """Whether prefixes are what the current policy accepts of old responses."""
        return self.mixes and self.selection == "verified"

    @property
    def mixes_lags(self) -> bool:
        """Whether prefixes of one run differ in age once it is warm."""
        snapshot = self.snapshot
        exact = self.source == "lookahead" or (snapshot.policy == "lagged" and snapshot.every == 1)
        drawn = self.lag_distribution != "fixed" or self.schedules.lag.moves
        aged = self.mixes and self.source != "dataset" and not self.verifies
        return aged and (self.source == "replay" or not exact or drawn)

    @property
    def largest_lag(self) -> int:
        """Over the whole run, in updates."""
        return max(self.lag, round(self.schedules.lag.end or 0))

    @model_validator(mode="after")
    def _check_age(self) -> Self:
        lagged = self.source == "lookahead" or (self.source == "snapshot" and self.snapshot.policy == "lagged")
        oldest = self.largest_lag + (self.snapshot.every - 1 if self.source == "snapshot" else 0)
        fits = self.max_age is None or not (self.mixes and lagged) or self.max_age >= oldest
        self.demand("max_age", fits, f"prefixes are up to {oldest} updates old by algorithm.soup.lag; use as many.")
        foreign = self.source == "snapshot" and self.snapshot.policy not in POLICIES
        known = self.max_age is None or not foreign
        self.demand("max_age", known, "another run's policy has no age in updates of this one; use null.")
        return self

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        replay, by_reward = self.source == "replay", self.selection in ("failed", "successful", "certain")
        ageless = self.source in ("replay", "dataset")
        weights_gone = "with source=snapshot the trainer no longer holds the weights that sample; use auto or rollout."
        by_trainer = self.behavior_log_probs == "trainer"
        self.demand("behavior_log_probs", not (by_trainer and self.source == "snapshot"), weights_gone)
        no_lag, shape = f"source={self.source} has no lag; ", self.schedules.lag.shape
        self.demand("schedules.lag.shape", not ageless or shape == "constant", f"{no_lag}drop it.")
        self.demand("lag_distribution", not ageless or self.lag_distribution == "fixed", f"{no_lag}use fixed.")
        no_reward = "a prefix has no reward before its response is complete; use source=replay."
        self.demand("selection", replay or not by_reward, no_reward)
        chooses = self.selection == "entropic" and not replay
        why = "selection=entropic chooses among 2 or more (but source=replay among a visit's responses); otherwise use"
        self.demand("candidates", chooses == (self.candidates > 1), f"{why} 1.")
        return self

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        if self.prefix_length.distribution == "whole":
            self.demand("on_eos", self.on_eos == "keep", "prefix_length.distribution=whole needs `keep`.")
            still = "has no length that schedules.prefix_length could move."
            self.demand("prefix_length.distribution", not self.schedules.prefix_length.moves, still)
            equal = "samples that share a whole response are equal; use 1."
            self.demand("samples_per_prefix", self.samples_per_prefix == 1, equal)
        return self

    @model_validator(mode="after")
    def _check_snapshots(self) -> Self:
        snapshot, needed = self.snapshot, self.snapshot.needed(self.largest_lag)
        if snapshot.policy == "lagged":
            wander = "with policy=lagged the age would wander; use policy=pool, or eviction=oldest."
            self.demand("snapshot.eviction", snapshot.eviction == "oldest", wander)
            gone = f"with lag={self.largest_lag} and every={snapshot.every} the snapshot that is old enough would be"
            why = f"{gone} gone; keep {needed} or more, or take them less often."
            self.demand("snapshot.keep", snapshot.keep is None or snapshot.keep >= needed, why)
        if self.source == "snapshot" and snapshot.placement == "shared":
            alone = "with snapshot.placement=shared each sample has a prefix of its own, sampled as it begins; use 1."
            self.demand("samples_per_prefix", self.samples_per_prefix == 1, alone)
        return self

    def fill(self, response_length: int) -> None:
        """Replace each null by its meaning for responses of at most so many tokens, and check the prefixes' lengths.

        Raises:
            SystemExit: prefixes that are longer than a response may be.
        """
        if self.snapshot.keep is None:
            self.snapshot.keep = self.snapshot.needed(self.largest_lag)
        self.prefix_length.fill(response_length)
        if self.mixes:
            self.prefix_length.check_range(response_length)
            end = self.schedules.prefix_length.end
            limit = 1 if self.prefix_length.unit == "fraction" else response_length - 1
            within = end is None or 0 <= end <= limit
            self.demand("schedules.prefix_length.end", within, f"use 0 to {limit}, as for its max.")
