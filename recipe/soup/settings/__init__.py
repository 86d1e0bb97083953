"""The keys under `algorithm.soup`: one pydantic model, with a file for each group of keys.

Each key has its type, bounds or choices, and a text from which the tables in recipe/soup/README.md are made
(`python -m recipe.soup.tools.settings_table`); rules between keys are validators beside them. Imports `errors` only.
"""

from recipe.soup.settings.demonstrations import DemonstrationSettings
from recipe.soup.settings.loss import ClipSettings
from recipe.soup.settings.prefix_length import PrefixLengthSettings
from recipe.soup.settings.schedules import Schedules, ScheduleSettings
from recipe.soup.settings.snapshot import BY_AGE, POLICIES, SnapshotSettings
from recipe.soup.settings.soup import SoupSettings, parse_settings

__all__ = [
    "BY_AGE",
    "POLICIES",
    "ClipSettings",
    "DemonstrationSettings",
    "PrefixLengthSettings",
    "ScheduleSettings",
    "Schedules",
    "SnapshotSettings",
    "SoupSettings",
    "parse_settings",
]
