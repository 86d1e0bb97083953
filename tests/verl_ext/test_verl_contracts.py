"""What we rely on in verl 0.9.1, by name: a version bump that changes one of these fails here, with the symbol."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from transfer_queue.controller import FieldMeta
from transformers import AutoTokenizer
from verl.checkpoint_engine.base import CheckpointEngineWorker
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, AgentLoopWorker
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.plugin.platform.platform_base import PlatformBase
from verl.single_controller.base.decorator import MAGIC_ATTR, Dispatch
from verl.single_controller.ray.base import split_resource_pool
from verl.trainer.ppo.core_algos import (
    compute_grpo_outcome_advantage,
    compute_policy_loss_vanilla,
    get_adv_estimator_fn,
)
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
from verl.utils.distributed import initialize_global_process_group_ray
from verl.utils.tokenizer.continuous_token import ContinuousTokenBuilder
from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits_v2
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver, BucketedWeightSender
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter
from verl.workers.utils.losses import ppo_loss

from verl_ext.plugin.callbacks import SUPPORTED_VERL, RequireCpuPlatform, require_matching_torch, require_supported_verl


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (PPOTrainer._fetch_one_gen_batch, ["self"]),
        (PPOTrainer._next_train_batch, ["self", "num_prompts"]),
        (PPOTrainer._submit_batch_to_rollout, ["self", "batch"]),
        (PPOTrainer._compute_old_log_prob, ["self", "batch", "metrics"]),
        (PPOTrainer._compute_advantage, ["self", "batch", "metrics"]),
        (PPOTrainer._update_actor, ["self", "batch", "metrics"]),
        (PPOTrainer._consume_sync_metrics, ["self"]),
        (PPOTrainer.step, ["self", "metrics", "timing_raw"]),
        (PPOTrainer._step_once, ["self", "metrics", "timing_raw", "sample_batch_size"]),
        (PPOTrainer._rollout_server_managers, ["self"]),
        (PPOTrainerSeparateAsync._init_resource_pool_mgr, ["self"]),
        (PPOTrainerSeparateAsync._setup, ["self"]),
        (PPOTrainerSeparateAsync.get_llm_client, ["self"]),
        (vLLMColocateWorkerExtension._update_weights, ["self", "weights", "peft_config", "base_sync_done"]),
        (vLLMColocateWorkerExtension.update_weights_from_ipc, ["self", "peft_config", "base_sync_done", "use_shm"]),
        (AgentLoopOutput.as_dict, ["self"]),
        (PPOTrainer._log_rollout_data, ["self", "batch", "timing_raw", "rollout_data_dir"]),
        (
            PPOTrainer._dump_generations,
            ["self", "inputs", "outputs", "gts", "scores", "reward_extra_infos_dict", "dump_path"],
        ),
        (
            PPOTrainer._write_generations,
            ["inputs", "outputs", "gts", "scores", "reward_extra_infos_dict", "dump_path", "global_steps"],
        ),
        (PPOTrainer._init_dump_executor, ["self"]),
        (PPOTrainer._shutdown_dump_executor, ["self"]),
        (PPOTrainer._save_checkpoint, ["self"]),
        (PPOTrainer._load_checkpoint, ["self"]),
        (PPOTrainer._init_dataloader, ["self"]),
        (PPOTrainer._build_replay_buffer, ["self"]),
        (PPOTrainerSync.on_init_end, ["self"]),
        (ReplayBuffer._clear_groups, ["self", "partition_id", "uids"]),
        (ReplayBuffer._materialize_batch, ["self", "partition_id", "selected_prompt_uids", "partition_snapshot"]),
        (ReplayBuffer.sample, ["self", "global_steps", "partition_id", "batch_size"]),
        (logprobs_from_logits_v2, ["logits", "labels"]),
        (entropy_from_logits, ["logits"]),
        (LLMServerClient._acquire_server, ["self", "request_id", "extra"]),
        (LLMServerClient._release_server, ["self", "server_id", "request_id"]),
        (PPOTrainerSync.on_sample_end, ["self"]),
        (PPOTrainerSync.on_step_end, ["self"]),
        (PPOTrainer._validate, ["self"]),
        (RolloutReplica.init_standalone, ["self"]),
        (RolloutReplica.init_colocated, ["self", "resource_pool"]),
        (ActorRolloutRefWorker.update_weights, ["self", "global_steps", "mode"]),
        (FSDPEngine.get_per_tensor_param, ["self", "layered_summon", "base_sync_done", "kwargs"]),
        (vLLMHttpServer.run_server, ["self", "args"]),
        (vLLMHttpServer.run_headless, ["self", "args"]),
        (vLLMHttpServer.set_global_steps, ["self", "global_steps"]),
        (RolloutReplicaRegistry.register, ["name", "loader"]),
        (split_resource_pool, ["resource_pool", "split_size"]),
        (SingleTurnAgentLoop.run, ["self", "sampling_params", "priority", "kwargs"]),
        (ToolAgentLoop.run, ["self", "sampling_params", "priority", "kwargs"]),
        (cast(Any, ToolAgentLoop)._handle_processing_tools_state, ["self", "agent_data"]),
        (cast(Any, ToolAgentLoop)._call_tool, ["self", "tool_call", "tools_kwargs", "agent_data"]),
        (
            AgentLoopBase.ct_merge_assistant_token,
            [
                *("self", "runtime_token_ids", "assistant_token_ids", "response_mask", "response_logprobs"),
                "assistant_logprobs",
            ],
        ),
        (
            AgentLoopBase.ct_merge_context_msg,
            [
                *("self", "previous_messages", "updated_messages", "runtime_token_ids", "response_mask"),
                *("response_logprobs", "tools"),
            ],
        ),
        (
            ContinuousTokenBuilder.align_response_metadata,
            ["self", "merge_result", "response_mask", "response_logprobs", "assistant_logprobs"],
        ),
        (ppo_loss, ["config", "model_output", "data", "dp_group"]),
        (initialize_global_process_group_ray, ["timeout_second", "backend"]),
    ],
)
def test_signature(function: Any, parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (LLMServerClient.generate, {"request_id", "prompt_ids", "sampling_params"}),
        (compute_grpo_outcome_advantage, {"token_level_rewards", "response_mask", "index", "norm_adv_by_std_in_grpo"}),
        (
            compute_policy_loss_vanilla,
            {"old_log_prob", "log_prob", "advantages", "response_mask", "rollout_is_weights"},
        ),
        (AgentLoopBase.ct_build_initial_tokens, {"messages", "tools"}),
        (vLLMHttpServer.generate, {"request_id", "prompt_ids", "sampling_params"}),
        (CheckpointEngineWorker.update_weights, {"global_steps"}),
        (CheckpointEngineWorker.execute_checkpoint_engine, {"method"}),
        (RolloutReplica.__init__, {"replica_rank", "config", "model_config", "gpus_per_node"}),
        (ReplayBuffer.__init__, {"poll_interval"}),
    ],
)
def test_parameters_that_we_pass(function: Any, names: set[str]) -> None:
    assert names <= set(inspect.signature(function).parameters)


def test_fields_of_outputs() -> None:
    assert {"token_ids", "log_probs", "stop_reason", "extra_fields"} <= set(TokenOutput.model_fields)
    assert {"response_ids", "response_logprobs", "extra_fields", "prompt_ids"} <= set(AgentLoopOutput.model_fields)


def test_the_mode_name_sync_selects_the_synchronous_behaviour() -> None:
    """SoupTrainer answers `sync` where verl asks for the trainer's mode."""
    assert 'self.trainer_mode == "sync"' in inspect.getsource(PPOTrainer._build_replay_buffer)


def test_the_synchronous_trainer_syncs_in_place_whatever_the_checkpoint_engine_is() -> None:
    """Why the backend's name is free for snapshots (`verl_ext.historical_policy`)."""
    assert 'checkpoint_engine_config.backend = "naive"' in inspect.getsource(PPOTrainer._setup)
    assert "self.checkpoint_engine.send_weights" in inspect.getsource(ActorRolloutRefWorker.update_weights)


def test_the_sync_ends_a_step_and_its_metrics_come_after_it() -> None:
    """Where `recipe.soup.verl_adapter.sync_stage` asks the engine, and how its answer reaches the step's metrics."""
    source = inspect.getsource(PPOTrainer.fit)
    assert re.search(r"self\.on_step_end\(\)\s+metrics\.update\(self\._consume_sync_metrics\(\)\)", source)


def test_verls_server_passes_on_no_answer_of_a_worker_but_an_error() -> None:
    """Why a worker raises that no new weights came (`verl_ext.weight_arrivals`)."""
    assert "return" not in inspect.getsource(vLLMHttpServer.collective_rpc)


def test_the_learning_rate_is_told_after_the_scheduler_has_moved_on() -> None:
    """So it is that of the step to come (`recipe.soup.verl_adapter.broken_steps`)."""
    source = inspect.getsource(TrainingWorker.train_batch)
    assert source.index("self.engine.train_batch(") < source.index("lr = self.engine.lr_scheduler_step()")


def test_an_update_that_is_not_finite_is_skipped_without_an_error() -> None:
    """What `recipe.soup.verl_adapter.broken_steps` finds in the metrics."""
    source = inspect.getsource(FSDPEngine.optimizer_step)
    assert "if not torch.isfinite(grad_norm):" in source
    assert "raise" not in source


def test_a_sample_is_graded_before_it_is_made_ready_for_the_queue() -> None:
    """So what our output's `as_dict` raises loses the sample, as a reward that raises does."""
    source = inspect.getsource(cast(Any, AgentLoopWorkerTQ).__ray_metadata__.modified_class._agent_loop_postprocess)
    assert source.index("self._compute_score(") < source.index("output.as_dict()") < source.index("async_kv_batch_put(")
    assert 'extra_fields["reward_extra_info"] = result["reward_extra_info"]' in inspect.getsource(
        AgentLoopWorker._compute_score
    )


def test_the_sender_of_weights_waits_for_an_answer() -> None:
    """Why a worker that fails while it receives weights must die (`verl_ext.vllm_worker`)."""
    assert "_ack_pending" in inspect.getsource(BucketedWeightReceiver.receive_weights)


def test_weights_are_sent_in_the_trainers_data_type_and_rounded_by_the_engine() -> None:
    """Why a snapshot that is rounded before has the same bits (`verl_ext.historical_policy.writing`)."""
    assert '"dtype": weight.dtype' in inspect.getsource(BucketedWeightSender.async_send_weights)


def test_every_training_worker_is_asked_for_the_shards_of_a_snapshot() -> None:
    """`verl_ext.historical_policy.taking` gives one argument a worker, and gets references at once."""
    how = getattr(ActorRolloutRefWorker.execute_checkpoint_engine, MAGIC_ATTR)
    assert how["dispatch_mode"] == cast(Any, Dispatch).DP_COMPUTE
    assert not how["blocking"]


def test_vllm_wants_its_share_of_the_whole_gpu_free_when_it_starts() -> None:
    """What `recipe.soup.checks.snapshot_memory` adds up; the trainer's weights and a sleeping engine are not free."""
    from vllm.v1.worker.utils import request_memory

    gpu: Any = SimpleNamespace(total_memory=80, free_memory=50, device_="cuda:0")
    fits, too_much = (SimpleNamespace(gpu_memory_utilization=share) for share in (0.6, 0.7))
    assert request_memory(gpu, cast(Any, fits)) == 48
    with pytest.raises(ValueError, match="Free memory on device"):
        request_memory(gpu, cast(Any, too_much))


def test_old_log_probs_are_put_by_name_and_a_field_keeps_its_type() -> None:
    """Why `transfer_queue.stored_in_float32` widens verl's first put, and how it can."""
    source = inspect.getsource(PPOTrainer._compute_old_log_prob)
    assert re.search(
        r"tq\.kv_batch_put\(\s*keys=batch\.keys, partition_id=batch\.partition_id, fields=data\.select\(", source
    )
    field = FieldMeta()
    field.update({"dtype": torch.bfloat16, "is_nested": True, "per_sample_shapes": []}, [])
    with pytest.raises(ValueError, match="dtype mismatch"):
        field.update({"dtype": torch.float32, "is_nested": True, "per_sample_shapes": []}, [])


def test_the_socket_of_a_weight_sync_is_named_after_rays_job_and_nothing_of_the_run() -> None:
    """Why `weight_sockets` adds the Ray node: two Rays on a machine both have a job of that number."""
    name = "ipc:///tmp/rl-colocate-zmq-{job_id}-replica-"
    assert name in inspect.getsource(ServerAdapter.__init__)
    assert name in inspect.getsource(vLLMColocateWorkerExtension._get_zmq_handle)


def test_a_weight_must_fit_into_a_bucket_only_in_shared_memory() -> None:
    """Why the bucket's size is looked at on a CPU only (`plugin.resolvers`): on GPUs a larger weight goes alone."""
    source = inspect.getsource(BucketedWeightSender.async_send_weights)
    assert source.index("assert not self.use_shm") < source.index("self._direct_send_large_weight(name, weight)")
    assert "self.use_shm = not is_support_ipc()" in inspect.getsource(ServerAdapter)


def test_verl_pins_the_weights_of_an_engine_that_only_reads_them() -> None:
    """What `verl_ext.cpu.process` takes from it on a CPU."""
    assert "offload_policy = CPUOffloadPolicy(pin_memory=True)" in inspect.getsource(FSDPEngine._build_fsdp_module)


def test_vllm_gets_a_seed_for_each_request_only_for_full_determinism() -> None:
    """Why training never meets what `soup-verl eval` avoids on a CPU: a seeded request's generator turned back."""
    source = inspect.getsource(vLLMHttpServer.generate)
    assert source.count('"seed"') == 1
    condition, _ = source[: source.index('"seed"')].splitlines()[-2:]
    assert condition.strip() == "if self.config.full_determinism:"


def test_our_cpu_platform_implements_verls_interface() -> None:
    from verl_ext.cpu.platform import PlatformCPU

    assert issubclass(PlatformCPU, PlatformBase)
    platform = PlatformCPU()
    assert platform.device_module.mem_get_info()[0] > 0
    assert platform.device_module.max_memory_allocated() == 0


def test_another_verl_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    require_supported_verl()
    monkeypatch.setattr("verl_ext.plugin.callbacks.version", lambda _: "0.10.0")
    with pytest.raises(SystemExit) as refusal:
        require_supported_verl()
    assert "0.10.0" in str(refusal.value)
    assert f"pip install verl=={SUPPORTED_VERL}" in str(refusal.value)


def test_a_vllm_for_gpus_is_refused_on_the_cpu_platform(composed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("hardware=cpu", "example=countdown")
    RequireCpuPlatform().on_job_start(config)
    versions = {"verl": SUPPORTED_VERL, "vllm": "0.24.0"}
    monkeypatch.setattr("verl_ext.plugin.callbacks.version", versions.__getitem__)
    with pytest.raises(SystemExit) as refusal:
        RequireCpuPlatform().on_job_start(config)
    assert "vllm is 0.24.0" in str(refusal.value)


def test_another_torch_is_refused_on_the_cpu_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    require_matching_torch()
    monkeypatch.setattr("verl_ext.plugin.callbacks.version", lambda _: "2.11.0+cu130")
    with pytest.raises(
        SystemExit, match=r"torch 2\.11\.0\+cu130 is installed.*compiled for torch==2\.13\.0\+cpu.*make install"
    ):
        require_matching_torch()


@pytest.mark.parametrize(
    ("estimator", "alone"),
    [
        *((name, "reward") for name in ("grpo", "grpo_vectorized", "rloo", "opo", "gpg")),
        *((name, "nothing") for name in ("rloo_vectorized", "reinforce_plus_plus_baseline")),
        ("grpo_passk", "error"),
    ],
)
def test_a_group_of_one_compares_nothing(estimator: str, alone: str) -> None:
    """verl's estimators give its raw reward, or nothing: recipe/soup/checks/batches.py refuses `rollout.n=1`."""
    rewards, mask = torch.zeros(2, 3), torch.ones(2, 3)
    rewards[:, -1] = torch.tensor([0.7, 0.7])
    estimate: Any = get_adv_estimator_fn(estimator)
    config = OmegaConf.create({"norm_adv_by_std_in_grpo": True})

    def advantages() -> torch.Tensor:
        index = np.array(["a", "b"], dtype=object)
        return estimate(token_level_rewards=rewards.clone(), response_mask=mask, index=index, config=config)[0]

    if alone == "error":
        with pytest.raises(ValueError, match="at least 2 samples"):
            advantages()
    else:
        assert advantages() == pytest.approx(torch.full((2, 3), 0.7 if alone == "reward" else 0.0), abs=1e-4)


def test_full_determinism_gives_every_request_of_an_engine_one_seed() -> None:
    """So the samples of a prompt are all equal: recipe/soup/checks/batches.py refuses it."""
    source = inspect.getsource(vLLMHttpServer.generate)
    assert 'sampling_params.setdefault("seed", self.replica_rank + self.config.seed)' in source
    assert "seed" not in inspect.getsource(SingleTurnAgentLoop) + inspect.getsource(LLMServerClient.generate)


def test_all_updates_of_a_step_have_old_log_probs_of_its_first_weights_and_a_sync_has_the_steps_number() -> None:
    """PPOTrainerSeparateAsync: hence a version is a sync, and the step's own version is that of the sync before it."""
    source = inspect.getsource(PPOTrainerSeparateAsync._compute_old_log_prob)
    assert "if self.local_trigger_step == 0:" in source
    assert source.index("restore_model_from_cpu(0)") < source.index("restore_model_from_cpu(self.local_trigger_step)")
    assert "standalone_checkpoint_manager.update_weights(self.global_steps)" in re.sub(
        r"\s+", "", inspect.getsource(PPOTrainerSeparateAsync.on_step_end)
    )


def test_what_is_under_way_is_saved_with_all_that_rides_on_it_and_sent_out_again() -> None:
    """PPOTrainer._submit_batch_to_rollout, ._save_checkpoint, ._reissue_inflight_prompts; AgentLoopWorkerTQ"""
    assert "fields=batch.select(" in inspect.getsource(PPOTrainer._submit_batch_to_rollout)
    assert "tq.save_checkpoint(" in inspect.getsource(PPOTrainer._save_checkpoint)
    again = inspect.getsource(PPOTrainer._reissue_inflight_prompts)
    assert "batch = tq.kv_batch_get(keys=inflight_uids" in again
    assert "self.agent_loop_manager.generate_sequences(batch)" in again
    worker = inspect.getsource(cast(Any, AgentLoopWorkerTQ).__ray_metadata__.modified_class._agent_loop_postprocess)
    assert "field.update(kwargs)" in worker  # with each sample all fields of its prompt
    assert '"global_steps": kwargs["global_steps"]' in worker  # when it was sent out


def test_adapters_in_verls_engine() -> None:
    """What verl_ext/historical_policy/adapter_server.py stands in for, and where it hooks in."""
    asks = inspect.getsource(vLLMHttpServer.generate)
    assert "lora_loaded = VLLM_LORA_INT_ID in await self.engine.list_loras()" in asks  # else the base model answers
    assert "lora_request=lora_request,\n" in asks
    launches = inspect.getsource(vLLMHttpServer.launch_server)
    assert launches.index("**engine_kwargs,") < launches.index('"max_loras": 1,')  # a config's own number is lost
    assert "await self.run_server(server_args)" in launches
    sends = inspect.getsource(ServerAdapter.update_weights)
    assert "await self.server_handle.set_global_steps.remote(global_steps)" in sends  # after each sync
    assert "self.remove_lora(VLLM_LORA_INT_ID)" in inspect.getsource(
        vLLMColocateWorkerExtension.update_weights_from_ipc
    )
    passes_on = inspect.getsource(LLMServerClient.generate)
    assert passes_on.index("await server.generate.remote(") < passes_on.rindex("**kwargs,")


def test_vllm_puts_an_adapter_into_the_slot_of_one_that_the_same_batch_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the current adapter pinned, two past ones in two slots: so adapter_server.py counts them."""
    from vllm.lora.model_manager import AdapterLRUCache, LoRAModelManager, LRUCacheLoRAModelManager

    manager: Any = LRUCacheLoRAModelManager.__new__(LRUCacheLoRAModelManager)
    monkeypatch.setattr(LRUCacheLoRAModelManager, "lora_slots", 2, raising=False)
    manager._active_adapters, manager._registered_adapters = (AdapterLRUCache(4, lambda _: None) for _ in range(2))

    def activate(self: Any, number: int) -> bool:
        self._active_adapters[number] = None
        return True

    monkeypatch.setattr(LoRAModelManager, "activate_adapter", activate)
    manager._registered_adapters[123] = None
    manager.pin_adapter(123)
    for number in (1003, 1004):  # vLLM's scheduler takes both: there are two slots
        manager.activate_adapter(number)
    assert set(manager._active_adapters) == {123, 1004}


def test_verls_dataset_hands_on_every_column(composed: Any, countdown_dir: Path, tmp_path: Path) -> None:
    """`RLHFDataset.__getitem__` and `collate_fn`: by these demonstrations come from a column of anybody's naming."""
    rows = pd.read_parquet(countdown_dir / "data" / "train.parquet").head(2)
    rows["target"] = [[{"content": "1+2=3"}], []]
    rows["solutions"] = ["1+2=3", None]
    rows.to_parquet(tmp_path / "train.parquet")
    config = composed("algorithm=soup", "example=countdown").data
    tokenizer = AutoTokenizer.from_pretrained(countdown_dir / "base_model")
    dataset = RLHFDataset(str(tmp_path / "train.parquet"), tokenizer, config)
    items = [dataset[number] for number in range(2)]
    added = {"raw_prompt", "dummy_tensor", "index", "tools_kwargs", "interaction_kwargs", "extra_info"}
    gone = {config.prompt_key} - set(items[0])
    assert set(items[0]) == (set(rows.columns) - gone) | added
    batch = collate_fn(items)
    assert list(batch["target"]) == [[{"content": "1+2=3"}], []]
    assert list(batch["solutions"]) == ["1+2=3", None]
    assert list(batch["data_source"]) == list(rows["data_source"])
