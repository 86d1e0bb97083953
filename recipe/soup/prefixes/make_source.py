"""The source that `algorithm.soup.source` names."""

from pathlib import Path

from recipe.soup.prefixes.lookahead import LookaheadSource
from recipe.soup.prefixes.plan import RunFacts
from recipe.soup.prefixes.replay import ReplaySource
from recipe.soup.prefixes.snapshot import HistoricalEngine, SnapshotSource
from recipe.soup.prefixes.source import Fetch, PrefixSource
from recipe.soup.settings import SoupSettings


def make_source(
    settings: SoupSettings,
    facts: RunFacts,
    fetch: Fetch,
    engine: HistoricalEngine | None,
    base_model: str,
    folder: Path | None,
) -> PrefixSource:
    """A source; one that never has a prefix if the settings do not mix.

    Args:
        engine: only for `snapshot`, which needs it, and the two that follow.
        base_model: version 0, where it lies.
        folder: of snapshot files, with `storage=disk`.
    """
    if not settings.mixes:
        return PrefixSource(settings, facts, fetch)
    if settings.source == "snapshot":
        assert engine is not None
        return SnapshotSource(settings, facts, fetch, engine, base_model, folder)
    classes = {"lookahead": LookaheadSource, "replay": ReplaySource}
    return classes[settings.source](settings, facts, fetch)
