"""Between the source `snapshot` with `placement=shared` and the adapters that serve past versions in verl's engines."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from verl.workers.rollout.replica import RolloutReplica

from recipe.soup.settings import SoupSettings
from verl_ext.historical_policy.adapters import take_adapter, take_zero_adapter, use_adapters
from verl_ext.historical_policy.snapshots import Snapshot

ADAPTER_FOLDER = "past_adapters"
AT_ONCE = 4
"""Versions of a pool that sample in one step, at most; the engine has a slot on the device for each (our choice)."""


class HistoricalAdapters:
    """The source's engine. Made before verl's, which must have room for more than one adapter.

    Args:
        config: verl's whole config; changed in place.
        settings: `algorithm.soup`.
    """

    own_gpus = 0
    replicas: tuple[RolloutReplica, ...] = ()
    """None beside verl's own."""

    def __init__(self, config: DictConfig, settings: SoupSettings) -> None:
        kept = settings.snapshot.keep or 1
        self.at_once = min(kept, AT_ONCE) if settings.snapshot.policy == "pool" else 1
        self.folder = Path(config.trainer.default_local_dir).absolute() / ADAPTER_FOLDER
        self.base_model = str(self.folder / "version_0")
        self._workers: list[Any] = []
        self._engines: list[RolloutReplica] = []
        use_adapters(config, self.at_once)

    def start(self, trainer: Any) -> None:
        """Write version 0."""
        self._workers = trainer.actor_rollout_wg.workers
        self._engines = trainer.llm_server_manager.get_replicas()
        take_zero_adapter(self._workers, self.folder)

    def take_snapshot(self, version: int) -> Snapshot:
        """Write the adapters that are trained now."""
        return take_adapter(self._workers, version, self.folder)

    def fault(self) -> str | None:
        """Say which adapter was missing in a request, if one was."""
        from verl_ext.historical_policy.adapter_server import adapter_fault

        return adapter_fault(self._engines)
