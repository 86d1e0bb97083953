"""What is kept of a version, by verl's real training worker in this process: a folder of PEFT's that is the version."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from peft import PeftModel
from safetensors.torch import load_file
from training_worker import BASE_MODEL, COUNTDOWN, Store, WorkerGroup
from transformers import AutoModelForCausalLM, PreTrainedModel
from verl.workers.rollout.replica import RolloutReplicaRegistry

from recipe.soup.run_settings import run_settings
from recipe.soup.verl_adapter.historical_adapters import HistoricalAdapters
from verl_ext.historical_policy import adapters
from verl_ext.historical_policy.adapter_server import AdapterReplica
from verl_ext.historical_policy.snapshots import ADAPTER_FILES, missing_file

pytestmark = pytest.mark.usefixtures("process_group")

SHARED = (
    *("algorithm=soup", "algorithm.soup.source=snapshot", "algorithm.soup.snapshot.placement=shared"),
    *("actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.target_modules=all-linear"),
)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RolloutReplicaRegistry, "_registry", dict(RolloutReplicaRegistry._registry))
    monkeypatch.setattr(adapters, "ray", SimpleNamespace(get=lambda answers: answers))


def made(composed: Any, tmp_path: Path, *overrides: str) -> tuple[DictConfig, HistoricalAdapters]:
    config = composed(*COUNTDOWN, *SHARED, f"trainer.default_local_dir={tmp_path}", *overrides)
    return config, HistoricalAdapters(config, run_settings(config))


def weights(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def merged(folder: str) -> dict[str, torch.Tensor]:
    base = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)
    return weights(PeftModel.from_pretrained(base, folder).merge_and_unload())  # pyright: ignore[reportCallIssue]


@pytest.mark.usefixtures("registry")
def test_a_version_is_kept_and_version_0_changes_nothing(composed: Any, tmp_path: Path) -> None:
    config, history = made(composed, tmp_path)
    worker: Any = WorkerGroup(config, Store()).worker
    worker.layered_summon = False  # verl's worker has it beside an engine
    actor = SimpleNamespace(worker_dict={"actor_rollout": worker, "other": object()})
    remote = SimpleNamespace(__ray_call__=SimpleNamespace(remote=lambda function: function(actor)))
    module = worker.actor.engine.module
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    replicas = SimpleNamespace(get_replicas=list)
    history.start(SimpleNamespace(actor_rollout_wg=SimpleNamespace(workers=[remote]), llm_server_manager=replicas))
    base = weights(AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32))
    nothing = merged(history.base_model)
    assert all(torch.equal(nothing[name], tensor) for name, tensor in base.items())

    snapshot = history.take_snapshot(3)
    folder = Path(snapshot.adapter.folder)
    assert (snapshot.version, folder) == (3, tmp_path / "past_adapters" / "version_3")
    assert missing_file(folder) is None
    assert snapshot.nbytes == sum((folder / name).stat().st_size for name in ADAPTER_FILES)
    assert snapshot.nbytes < (BASE_MODEL / "model.safetensors").stat().st_size / 5
    found, state = merged(str(folder)), {k: v.full_tensor() for k, v in module.state_dict().items()}
    scaling = config.actor_rollout_ref.model.lora_alpha / 4
    changed = 0
    for name, tensor in base.items():
        down = f"base_model.model.{name.removesuffix('weight')}lora_A.default.weight"
        if down in state:
            changed += 1
            tensor = tensor + scaling * state[down.replace("lora_A", "lora_B")] @ state[down]
        assert torch.allclose(found[name], tensor, atol=1e-4), name
    assert changed == 3 * 7

    # A link that a checkpoint holds is not written into when the version is taken again.
    link = tmp_path / "checkpoint"
    link.hardlink_to(folder / ADAPTER_FILES[1])
    before = load_file(link)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    history.take_snapshot(3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(link).items())
    assert not any(tensor.any() for tensor in load_file(folder / ADAPTER_FILES[1]).values())


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("overrides", "slots", "kept"),
    [
        ([], 2, 3),
        (["algorithm.soup.snapshot.policy=pool", "algorithm.soup.snapshot.keep=3"], 4, 5),
        (["algorithm.soup.snapshot.policy=pool", "algorithm.soup.snapshot.keep=30"], 5, 6),
        (["+actor_rollout_ref.rollout.engine_kwargs.vllm.max_loras=9"], 9, 10),
        (["+actor_rollout_ref.rollout.engine_kwargs.vllm.max_cpu_loras=9"], 2, 9),
    ],
)
def test_the_engine_has_room_for_what_a_step_may_use(
    composed: Any, tmp_path: Path, overrides: list[str], slots: int, kept: int
) -> None:
    config, history = made(composed, tmp_path, *overrides)
    room = config.actor_rollout_ref.rollout.engine_kwargs.vllm
    assert (room.max_loras, room.max_cpu_loras) == (slots, kept)
    assert history.at_once < slots
    assert room.worker_extension_cls == "verl_ext.vllm_worker.WorkerExtension"
    assert RolloutReplicaRegistry.get("vllm") is AdapterReplica
