"""What verl asks Ray for, against what there is."""

import inspect
from collections.abc import Callable
from pkgutil import resolve_name

import pytest
import ray
from omegaconf import DictConfig
from ray.util.placement_group import placement_group
from refusals import sentence

from verl_ext import placement
from verl_ext.placement import Resources, asked_for, check_placement, cluster_address

Compose = Callable[..., DictConfig]

APART = "trainer.v1.trainer_mode=separate_async"
UNITS = "transfer_queue.backend.SimpleStorage.num_data_storage_units"


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda *_: None)


@pytest.mark.parametrize(
    ("overrides", "cpus", "gpus"),
    [
        ("trainer.n_gpus_per_node=1", 3 + 9, 1),
        ("trainer.n_gpus_per_node=1 trainer.use_v1=false", 3, 1),
        ("trainer.n_gpus_per_node=8 trainer.nnodes=2", 48 + 9, 16),
        (f"trainer.n_gpus_per_node=1 {UNITS}=1", 3 + 2, 1),
        ("trainer.n_gpus_per_node=1 transfer_queue.backend.storage_backend=MooncakeStore", 3 + 1, 1),
        (
            "trainer.n_gpus_per_node=1 reward.reward_model.enable_resource_pool=true reward.reward_model.nnodes=1 "
            "reward.reward_model.n_gpus_per_node=2",
            9 + 9,
            3,
        ),
        (f"trainer.n_gpus_per_node=2 {APART} actor_rollout_ref.rollout.nnodes=1", 6 + 4 + 9, 4),
        (f"trainer.n_gpus_per_node=2 {APART} trainer.use_v1=false actor_rollout_ref.rollout.nnodes=1", 6, 2),
        ("trainer.n_gpus_per_node=2 actor_rollout_ref.rollout.nnodes=1", 6 + 9, 2),
    ],
)
def test_what_a_run_asks_for(composed: Compose, overrides: str, cpus: int, gpus: int) -> None:
    assert asked_for(composed("algorithm=grpo", *overrides.split())) == Resources(cpus, gpus)


@pytest.mark.parametrize(
    ("symbol", "words"),
    [
        ("verl.single_controller.ray.base.RayResourcePool.get_placement_groups", '"CPU": self.max_colocate_count'),
        ("verl.single_controller.ray.base.ResourcePoolManager", "max_colocate_count: int = 3"),
        ("verl.workers.rollout.replica.RolloutReplica.init_standalone", "max_colocate_count=2"),
        ("transfer_queue.controller", "@ray.remote(num_cpus=1)\nclass TransferQueueController"),
        ("transfer_queue.storage.simple_storage", "@ray.remote(num_cpus=1)\nclass SimpleStorageUnit"),
    ],
)
def test_it_is_still_what_verl_asks_for(symbol: str, words: str) -> None:
    assert words in inspect.getsource(resolve_name(symbol))


def test_a_machine_with_less_is_refused(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("algorithm=grpo", "trainer.n_gpus_per_node=1")
    for there, words in (
        (Resources(64, 0), "trainer.n_gpus_per_node=1: a run of 1 GPUs in all, but this machine has 0"),
        (Resources(11, 1), "ray_kwargs.ray_init.num_cpus=None: verl reserves 12 CPUs in all, but this machine has 11"),
    ):
        monkeypatch.setattr(placement, "here", lambda _, there=there: there)
        assert sentence(check_placement, config).startswith(words)
    for there in (Resources(12, 1), None):
        monkeypatch.setattr(placement, "here", lambda _, there=there: there)
        check_placement(config)


def test_what_the_config_gives_ray_counts(composed: Compose) -> None:
    config = composed("algorithm=grpo", "hardware=cpu")
    assert placement.here(config) == Resources(16, 2)
    config.ray_kwargs.ray_init.num_cpus = None
    found = placement.here(config)
    assert found is not None
    assert found.cpus >= 1
    config.ray_kwargs.ray_init.num_gpus = None
    config.trainer.device = "npu"
    assert placement.here(config) is None


def test_gpus_that_are_not_visible_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = "ray._private.accelerators.nvidia_gpu.NvidiaGPUAcceleratorManager.get_current_node_num_accelerators"
    monkeypatch.setattr(manager, staticmethod(lambda: 4))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert placement.gpus_here("cuda") == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert placement.gpus_here("cuda") == 2


def test_a_cluster_is_not_judged_by_this_machine(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("algorithm=grpo", "+ray_kwargs.ray_init.address=10.0.0.1:6379")
    assert cluster_address(config) == "10.0.0.1:6379"
    check_placement(config)
    config = composed("algorithm=grpo")
    assert cluster_address(config) is None
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert cluster_address(config) == "auto"
    assert cluster_address(composed("algorithm=grpo", "hardware=cpu")) is None  # always a Ray of its own


def test_rays_actors_ask_for_nothing_unless_they_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that as many CPUs as are reserved are enough, and one less is not: seen with a Ray of its own."""

    class Quiet:  # in here, so that Ray sends it along
        def ping(self) -> bool:
            return True

    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    ray.shutdown()  # which a test before this one may have made start by itself
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        keeps = [ray.remote(num_cpus=1)(Quiet).remote() for _ in range(2)]
        assert ray.get([actor.ping.remote() for actor in keeps]) == [True, True]
        enough = placement_group([{"CPU": 1}], strategy="STRICT_PACK")
        assert enough.wait(30)
        assert ray.get(ray.remote(Quiet).remote().ping.remote(), timeout=30)  # none is free
        assert not placement_group([{"CPU": 1}], strategy="STRICT_PACK").wait(2)
    finally:
        ray.shutdown()
