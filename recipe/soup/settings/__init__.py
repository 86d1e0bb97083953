"""The keys under `algorithm.soup`: one pydantic model, a file for each group of keys."""

from recipe.soup.settings.soup import (
    BY_AGE,
    POLICIES,
    ClipSettings,
    PrefixLengthSettings,
    Schedules,
    ScheduleSettings,
    SnapshotSettings,
    SoupSettings,
    parse_settings,
)

__all__ = [
    "BY_AGE",
    "POLICIES",
    "ClipSettings",
    "PrefixLengthSettings",
    "ScheduleSettings",
    "Schedules",
    "SnapshotSettings",
    "SoupSettings",
    "parse_settings",
]
