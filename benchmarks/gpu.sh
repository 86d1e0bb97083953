#!/usr/bin/env bash
# On one GPU, with the Qwen3-0.6B architecture and random weights (nothing is downloaded), sleep mode and CUDA weight
# transfer:
#
#   benchmarks/gpu.sh exact lookahead|replay|snapshot     # four steps in fp32, every ratio checked
#   benchmarks/gpu.sh cost lookahead|replay|snapshot      # mixed against unmixed steps in bf16, blocks of one run
#
# Further arguments (key=value) go to verl; `cost` also takes those of benchmarks.step_cost, such as --blocks 5.
# `cost` without flash-attn: actor_rollout_ref.model.use_remove_padding=false \
#                            +actor_rollout_ref.model.override_config.attn_implementation=sdpa
set -euo pipefail
cd "$(dirname "$0")/.."
usage="Say what to do: $0 exact|cost lookahead|replay|snapshot [key=value ...]"
[[ ${1:-} =~ ^(exact|cost)$ && ${2:-} =~ ^(lookahead|replay|snapshot)$ ]] || { echo "$usage" >&2; exit 2; }
check=$1 source=$2
shift 2
model=$PWD/runs/qwen3-0.6b data=$PWD/examples/countdown/data
[ -e "$model/config.json" ] || python -m benchmarks.random_model "$model"
rollout=actor_rollout_ref.rollout actor=actor_rollout_ref.actor
common=(
    data.train_files="$data/train.parquet" data.val_files="$data/val.parquet" data.max_prompt_length=64
    reward.custom_reward_function.path=pkg://examples.countdown.reward
    actor_rollout_ref.model.path="$model" $rollout.name=vllm $rollout.n=8 $rollout.ignore_eos=true
    $rollout.gpu_memory_utilization=0.4 $actor.strategy=fsdp2
    trainer.n_gpus_per_node=1 trainer.nnodes=1 'trainer.logger=[console,file]' trainer.val_before_train=false
    trainer.test_freq=-1 trainer.resume_mode=disable algorithm.soup.lag=1 algorithm.soup.snapshot.every=1
)
if [ "$check" = cost ]; then
    exec python -m benchmarks.step_cost "$source" --no-example --blocks 9 --block-length 6 \
        --results benchmarks/results/gpu "${common[@]}" trainer.save_freq=-1 algorithm.soup.warm_start=fill \
        data.train_batch_size=32 data.train_max_samples=64 trainer.total_epochs=100000 \
        data.max_response_length=1024 algorithm.soup.prefix_length.max=512 $rollout.max_model_len=1088 \
        $actor.ppo_mini_batch_size=16 $actor.ppo_micro_batch_size_per_gpu=16 $actor.optim.lr=1e-6 \
        $rollout.log_prob_micro_batch_size_per_gpu=16 "$@"
fi

# A learning rate at which a version differs from the next by more than rounding. `replay` needs prompts that come back.
# flash-attn knows no fp32.
run=$PWD/runs/gpu_exact_$source
rm -rf "$run"
python -m verl.trainer.main_ppo algorithm=soup algorithm.soup.source="$source" "${common[@]}" \
    algorithm.soup.warm_start=pure data.train_batch_size=16 data.train_max_samples=32 trainer.total_epochs=2 \
    data.max_response_length=256 algorithm.soup.prefix_length.max=128 $rollout.max_model_len=320 \
    $actor.ppo_mini_batch_size=8 $actor.ppo_micro_batch_size_per_gpu=16 $actor.optim.lr=1e-4 \
    $rollout.log_prob_micro_batch_size_per_gpu=16 $rollout.dtype=float32 $actor.fsdp_config.dtype=float32 \
    +$actor.fsdp_config.mixed_precision='{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}' \
    trainer.total_training_steps=4 trainer.save_freq=1 trainer.default_local_dir="$run/checkpoints" \
    trainer.rollout_data_dir="$run/samples" '+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_ROOT=runs' \
    actor_rollout_ref.model.use_remove_padding=false \
    +actor_rollout_ref.model.override_config.attn_implementation=sdpa \
    "$actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]" "$@"
python -m recipe.soup.verify --samples "$run/samples" --checkpoints "$run/checkpoints" --base-model "$model"
