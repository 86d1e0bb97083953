"""`algorithm.soup.schedules`: which values move over training, and how."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from recipe.soup.settings.group import Group, Number, Whole, key


class ScheduleSettings(Group):
    """How one value moves. The paper does not say."""

    shape: Literal["constant", "linear", "cosine"] = key(
        "constant",
        "How the value moves: not at all (`constant`), or from the key's own value to `end`, evenly (`linear`) or "
        "slowly at both ends (`cosine`).",
        origin="our choice; Prefix-RFT lowers its prefix share by cosine",
    )
    end: Number | None = key(
        None, "Value at step `steps`, in the unit of the key that moves, which for `prefix_length` is its `max`."
    )
    steps: Whole | None = key(
        None,
        "Step at which `end` is reached; null: the run's last one.",
        when="Steps are counted in prompts, `data.train_batch_size` each: where groups are refilled, schedules run "
        "ahead.",
    )
    warmup: Whole = key(
        0,
        "Number of first steps over which the value rises linearly from 0.",
        ge=0,
        advice="counts steps; use 0 or more.",
    )

    @property
    def moves(self) -> bool:
        """Whether the value is ever another one than the key's own."""
        return self.shape != "constant" or self.warmup > 0


class Schedules(Group):
    """The keys that can move."""

    path: ClassVar[str] = "algorithm.soup.schedules"

    mixed_share: ScheduleSettings = Field(default_factory=ScheduleSettings)
    prefix_length: ScheduleSettings = Field(default_factory=ScheduleSettings)
    lag: ScheduleSettings = Field(default_factory=ScheduleSettings)

    @model_validator(mode="after")
    def _check_each(self) -> Self:
        for name in type(self).model_fields:
            schedule: ScheduleSettings = getattr(self, name)
            goes, given = schedule.shape != "constant", schedule.end is not None
            self.demand(f"{name}.end", goes == given, "give it with linear or cosine only.")
            self.demand(f"{name}.steps", goes or schedule.steps is None, "give it with linear or cosine only.")
            fits = schedule.steps is None or schedule.steps > schedule.warmup + 1
            first = f"{self.path}.{name}.warmup + 1 = {schedule.warmup + 1}"
            self.demand(f"{name}.steps", fits, f"use more than {first} steps.")
        share, lag = self.mixed_share.end, self.lag.end
        self.demand("mixed_share.end", share is None or 0 <= share <= 1, "a share lies between 0 and 1.")
        self.demand("lag.end", lag is None or 0 <= lag < float("inf"), "a lag counts updates; use 0 or more.")
        return self
