"""`algorithm.soup.prefix_length`: how many tokens of a mixed sample come from the historical policy."""

from typing import ClassVar, Literal

from recipe.soup.settings.group import Group, Number, key


class PrefixLengthSettings(Group):
    """The range of lengths, and how one is drawn from it. The paper does not say."""

    path: ClassVar[str] = "algorithm.soup.prefix_length"

    distribution: Literal["uniform", "fixed", "beta", "whole"] = key(
        "uniform",
        "How a length is drawn: from `min` to `max`, both included (`uniform`), always `max` (`fixed`), from "
        "Beta(`alpha`, `beta`) stretched over the same range (`beta`), or the whole response (`whole`), which is "
        "trajectory-level mixing.",
        origin="our choice; `whole` with `source=replay` is the paper's baseline (RePO, ExGRPO)",
        when="`whole` to compare with whole stale trajectories.",
    )
    unit: Literal["tokens", "fraction"] = key(
        "tokens",
        "Unit of `min` and `max`: `tokens`, or `fraction` of the prompt's typical response, which is the mean of its "
        "last visit, or of the run for new prompts.",
        when="`fraction` where lengths differ much or change in training.",
    )
    min: Number | None = key(None, "Shortest prefix, at least 1 token; null: 1 token, or fraction 0.")
    max: Number | None = key(
        None,
        "Longest prefix, at most `data.max_response_length - 1` tokens or fraction 1; null: half of "
        "`data.max_response_length`, or fraction 0.5.",
        when="Set it to about half of a *typical* response.",
    )
    alpha: Number = key(
        2.0,
        "Of the beta distribution: the larger beside `beta`, the longer the prefixes.",
        gt=0,
        advice="use a number above 0.",
    )
    beta: Number = key(
        2.0,
        "Of the beta distribution: the larger beside `alpha`, the shorter the prefixes.",
        gt=0,
        advice="use a number above 0.",
    )

    def fill(self, response_length: int) -> None:
        """Replace null by what it means for responses of at most so many tokens."""
        if self.distribution == "whole":
            self.unit, self.min, self.max = "tokens", response_length, response_length
        fraction = self.unit == "fraction"
        if self.min is None:
            self.min = 0.0 if fraction else 1
        if self.max is None:
            self.max = 0.5 if fraction else max(response_length // 2, 1)

    def check_range(self, response_length: int) -> None:
        """Check `min` and `max`, once they are filled, for responses of at most so many tokens.

        Raises:
            SystemExit: a prefix would be empty, or leave the current policy nothing to write.
        """
        low, high = self.min, self.max
        assert low is not None
        assert high is not None
        if self.distribution == "whole":
            return
        if self.unit == "fraction":
            self.demand("max", 0 < high <= 1, "a fraction lies above 0 and up to 1.")
            self.demand("min", 0 <= low <= high, "a fraction lies from 0 to max.")
            return
        longest = response_length - 1
        tokens = f"a prefix has 1 to data.max_response_length - 1 = {longest} tokens, so that the current policy has"
        self.demand("max", 1 <= high <= longest, f"{tokens} one left to write.")
        self.demand("min", 1 <= low <= high, f"use 1 to prefix_length.max = {high:g} tokens.")
