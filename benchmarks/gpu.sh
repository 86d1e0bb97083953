#!/usr/bin/env bash
# The step-cost benchmark on one GPU at realistic shapes: the Qwen3-0.6B architecture with random weights, 64 prompts x
# 8 samples x up to 2,048 tokens, sleep mode and CUDA weight transfer. Then four steps whose ratios are checked.
#
#   benchmarks/gpu.sh lookahead
#   benchmarks/gpu.sh replay
#   benchmarks/gpu.sh snapshot                # colocated; further arguments (key=value) go to verl
set -euo pipefail
cd "$(dirname "$0")/.."
source=${1:?which source: lookahead, snapshot or replay?}
shift
model=$PWD/runs/qwen3-0.6b data=$PWD/examples/countdown/data
[ -e "$model/config.json" ] || python -m benchmarks.random_model "$model"
rollout=actor_rollout_ref.rollout actor=actor_rollout_ref.actor
shape=(
    data.train_files="$data/train.parquet" data.val_files="$data/val.parquet" data.train_batch_size=64
    data.max_prompt_length=64 data.max_response_length=2048 data.train_max_samples=128 trainer.total_epochs=100000
    reward.custom_reward_function.path=pkg://examples.countdown.reward
    actor_rollout_ref.model.path="$model" $rollout.name=vllm $rollout.n=8 $rollout.gpu_memory_utilization=0.4
    $rollout.max_model_len=2176 $rollout.ignore_eos=true $rollout.log_prob_micro_batch_size_per_gpu=32
    $actor.strategy=fsdp2 $actor.ppo_mini_batch_size=32 $actor.ppo_micro_batch_size_per_gpu=16 $actor.optim.lr=1e-6
    trainer.n_gpus_per_node=1 trainer.nnodes=1 'trainer.logger=[console,file]' trainer.val_before_train=false
    trainer.test_freq=-1 trainer.resume_mode=disable algorithm.soup.lag=1 algorithm.soup.warm_start=fill
    algorithm.soup.snapshot.every=1 algorithm.soup.prefix_length.max=1024
)
python -m benchmarks.step_cost "$source" --no-example --blocks 8 --block-length 6 --results benchmarks/results/gpu \
    trainer.save_freq=-1 "${shape[@]}" "$@"

run=$PWD/runs/gpu_exact_$source
python -m verl.trainer.main_ppo algorithm=soup algorithm.soup.source="$source" "${shape[@]}" "$@" \
    trainer.total_training_steps=4 trainer.save_freq=1 trainer.default_local_dir="$run/checkpoints" \
    trainer.rollout_data_dir="$run/samples" '+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_ROOT=runs' \
    "$actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]"
# In bf16: what remains is the mismatch between vLLM, the trainer and plain transformers in fp32.
python -m recipe.soup.verify --samples "$run/samples" --checkpoints "$run/checkpoints" --base-model "$model"
