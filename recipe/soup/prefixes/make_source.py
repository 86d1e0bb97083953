"""Make the source that `algorithm.soup.source` names, or one without prefixes."""

from pathlib import Path
from typing import Any

from recipe.soup.prefixes.dataset import DatasetSource
from recipe.soup.prefixes.demonstrations import Demonstrations
from recipe.soup.prefixes.lookahead import LookaheadSource
from recipe.soup.prefixes.plan import RunFacts
from recipe.soup.prefixes.prefix import Prefix
from recipe.soup.prefixes.queue import Chunk
from recipe.soup.prefixes.replay import ReplaySource
from recipe.soup.prefixes.shared import AdapterEngine, SharedSource
from recipe.soup.prefixes.snapshot import HistoricalEngine, SnapshotSource
from recipe.soup.prefixes.source import Fetch, PrefixSource
from recipe.soup.prefixes.steered import SteeredSource
from recipe.soup.prefixes.verified import Scores, VerifiedSource
from recipe.soup.settings import SoupSettings


class NoPrefixes(PrefixSource):
    """Only fetches prompts: the source of a run that mixes nothing."""

    def _prefixes(self, chunk: Chunk, step: int) -> list[dict[int, Prefix]]:
        return [{} for _ in chunk.messages]


def make_source(
    settings: SoupSettings,
    facts: RunFacts,
    fetch: Fetch,
    engine: Any,
    base_model: str,
    folder: Path | None,
    demonstrations: Demonstrations | None = None,
    scores: Scores | None = None,
) -> PrefixSource:
    """Make the source of a run: the one that the settings name, or `NoPrefixes` if they do not mix.

    The arguments from `engine` on are for one source only.

    Args:
        engine: samples with past weights, a `HistoricalEngine`, or keeps them, an `AdapterEngine` (`placement=shared`).
        base_model: folder or name of version 0.
        folder: where snapshot files go, if they go into files.
        demonstrations: of the prompts that are fetched; `dataset` needs them.
        scores: of responses under the current policy; `selection=verified` needs them.
    """
    if not settings.mixes:
        return NoPrefixes(settings, facts, fetch)
    if settings.source == "snapshot":
        if settings.snapshot.placement == "shared":
            assert folder is not None
            adapters: AdapterEngine = engine
            return SharedSource(settings, facts, fetch, adapters, base_model, folder)
        weights: HistoricalEngine = engine
        return SnapshotSource(settings, facts, fetch, weights, base_model, folder)
    if settings.source == "dataset":
        assert demonstrations is not None
        return DatasetSource(settings, facts, fetch, demonstrations)
    if settings.selection == "verified":
        assert scores is not None
        return VerifiedSource(settings, facts, fetch, scores)
    if settings.selection == "steered":
        return SteeredSource(settings, facts, fetch)
    classes = {"lookahead": LookaheadSource, "replay": ReplaySource}
    return classes[settings.source](settings, facts, fetch)
