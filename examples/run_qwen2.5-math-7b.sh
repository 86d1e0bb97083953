#!/usr/bin/env bash
# Qwen2.5-Math-7B learns mathematics by SOUP (soup), by GRPO with every other setting equal (grpo), or by GRPO in
# verl's own trainer (verl). From the repository's root:
#
#   python -m examples.data.prepare dapo_math_17k math500 --out data    # once; or elsewhere, with MATH_DATA=<folder>
#   examples/run_qwen2.5-math-7b.sh soup|grpo|verl [key=value ...]    # any key of verl's and ours; the last one wins
#
# GPUs: 8 of 80 GB on one node. Training keeps 15 GB on each: 16 bytes a parameter for weights, gradients and Adam
# in fp32, over 8 GPUs. Beside it come, in turns, vLLM (48 GB; 2 GPUs a replica) and about 18 GB of
# logits and activations (more without flash-attn: docs/gpu.md). Computed, not measured: not run on a GPU yet.
# Batch: 128 prompts x 8 samples a step, in mini-batches of 64 prompts and micro-batches of up to 16,384 tokens;
# prompts of up to 1,024 tokens, responses of up to 3,072; the model's context has 4,096.
set -euo pipefail
[[ ${1:-} =~ ^(soup|grpo|verl)$ ]] ||
    { echo "Say which algorithm to train with: $0 soup|grpo|verl [key=value ...]" >&2; exit 2; }
data=${MATH_DATA:-$PWD/data}
exec python -m verl.trainer.main_ppo algorithm="$1" example=math \
    data.train_files="$data/dapo_math_17k.parquet" data.val_files="$data/math500.parquet" \
    actor_rollout_ref.model.path=Qwen/Qwen2.5-Math-7B \
    data.max_response_length=3072 \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    trainer.n_gpus_per_node=8 trainer.project_name=qwen2.5-math-7b \
    "${@:2}"
