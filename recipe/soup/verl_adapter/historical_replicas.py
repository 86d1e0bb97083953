"""Between the source `snapshot` and the replicas that serve past weights (`verl_ext.historical_policy`)."""

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from verl.trainer.ppo.utils import Role
from verl.workers.rollout.replica import RolloutReplica

from recipe.soup.checks.snapshot_memory import engine_overrides
from recipe.soup.settings import SoupSettings
from verl_ext.historical_policy.policy import HistoricalPolicy
from verl_ext.historical_policy.snapshots import Snapshot
from verl_ext.historical_policy.taking import take_snapshot, use_snapshots

WEIGHTS_FOLDER = "past_weights"


class HistoricalReplicas:
    """The source's engine. Made before verl's workers, which must learn to write snapshots; started after them.

    Args:
        config: verl's whole config; changed in place.
        settings: `algorithm.soup`.
    """

    def __init__(self, config: DictConfig, settings: SoupSettings) -> None:
        self._config, self._settings = config, settings.snapshot
        on_disk = settings.snapshot.storage == "disk"
        self.folder = Path(config.trainer.default_local_dir).absolute() / WEIGHTS_FOLDER if on_disk else None
        self.base_model = str(config.actor_rollout_ref.model.path)
        use_snapshots(config, self.folder)
        self._actor_rollout_wg: Any = None
        self._policy: HistoricalPolicy | None = None

    def start(self, trainer: Any) -> None:
        """Launch the replicas beside those of verl's trainer."""
        self._actor_rollout_wg = trainer.actor_rollout_wg
        mapping = trainer.resource_pool_manager.mapping
        role = Role.ActorRolloutRef if Role.ActorRolloutRef in mapping else Role.ActorRollout
        self._policy = HistoricalPolicy(
            self._config,
            first_rank=len(trainer.llm_server_manager.get_replicas()),
            placement=self._settings.placement,
            n_gpus=self._settings.n_gpus,
            pool=trainer.resource_pool_manager.get_resource_pool(role),
            overrides=engine_overrides(self._config, self._settings),
        )
        self._policy.start()

    @property
    def own_gpus(self) -> int:
        """GPUs that nobody else uses."""
        return sum(replica.world_size for replica in self.replicas) if self._settings.placement == "standalone" else 0

    @property
    def replicas(self) -> list[RolloutReplica]:
        """Those that serve past weights."""
        return self._policy.replicas if self._policy is not None else []

    def take_snapshot(self, version: int) -> Snapshot:
        """Copy the trainer's current weights; they are written while training goes on."""
        return take_snapshot(self._actor_rollout_wg, version)

    def sample(self, snapshot: Snapshot, prompts: Sequence[Any], max_tokens: Sequence[int]) -> "Future[list[Any]]":
        """Sample one response to each prompt; see `HistoricalPolicy.sample`."""
        assert self._policy is not None, "start comes first"
        return self._policy.sample(snapshot, prompts, max_tokens)
