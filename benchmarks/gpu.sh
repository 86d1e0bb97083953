#!/usr/bin/env bash
# What has to be proved on one GPU. All of it, piece by piece (results in benchmarks/results/gpu/):
#
#   benchmarks/gpu.sh all --seconds 540     # what has no result yet and fits into the time; call it until nothing is left
#
# or one check:
#
#   benchmarks/gpu.sh exact lookahead|replay|snapshot    # SmolLM2 in fp32: every ratio against plain transformers
#   benchmarks/gpu.sh cost lookahead|replay|snapshot     # Qwen3-0.6B's shape in bf16: mixed against unmixed steps
#   benchmarks/gpu.sh log-probs rollout|trainer          # SmolLM2 in bf16: what age does to ratios, and what rounding
#   benchmarks/gpu.sh learn soup|grpo                    # SmolLM2 in bf16: 60 steps of arithmetic
#   benchmarks/gpu.sh lab soup|grpo                      # a step of the lab with SmolLM2 in bf16, and the best possible
#
# Further arguments (key=value) go to verl, also from `all` (for a rehearsal without a GPU: hardware=cpu); `cost` also
# takes those of benchmarks.step_cost, such as --blocks 9. SmolLM2's folder is $SMOLLM2 (default: runs/smollm2/model,
# made if it is not there); Qwen3's has random weights. Nothing else is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
usage="Say what to do: $0 all|exact|cost|log-probs|learn|lab ... (its first lines say what there is)"
what="${1:-} ${2:-}"
[ "${1:-}" != all ] || exec python -m benchmarks.gpu_checks "${@:2}"
[[ $what =~ ^((exact|cost)\ (lookahead|replay|snapshot)|log-probs\ (rollout|trainer)|(learn|lab)\ (soup|grpo))$ ]] ||
    { echo "$usage" >&2; exit 2; }
check=$1 kind=$2 name=${1/-/_}_$2
shift 2

rollout=actor_rollout_ref.rollout actor=actor_rollout_ref.actor
one_gpu=(
    trainer.n_gpus_per_node=1 trainer.nnodes=1 'trainer.logger=[console,file]' trainer.resume_mode=disable
    trainer.val_before_train=false trainer.test_freq=-1 trainer.save_freq=-1
    $rollout.name=vllm $rollout.tensor_model_parallel_size=1 $rollout.gpu_memory_utilization=0.3 $rollout.n=8
    $actor.strategy=fsdp2 $actor.use_dynamic_bsz=true
)

if [ "$check" = cost ]; then
    model=$PWD/runs/qwen3-0.6b data=$PWD/examples/countdown/data
    [ -e "$model/config.json" ] || python -m benchmarks.random_model "$model"
    # With random weights no response ends by itself or solves anything: all go to the limit, and a hash rewards them.
    echo "== result"
    exec python -m benchmarks.step_cost "$kind" --no-example --blocks 5 --block-length 5 --uncounted 1 \
        --results benchmarks/results/gpu "${one_gpu[@]}" \
        data.train_files="$data/train.parquet" data.val_files="$data/val.parquet" data.max_prompt_length=64 \
        reward.custom_reward_function.path=pkg://benchmarks.hash_reward actor_rollout_ref.model.path="$model" \
        data.train_batch_size=16 data.train_max_samples=32 trainer.total_epochs=100000 data.max_response_length=512 \
        algorithm.soup.lag=1 algorithm.soup.warm_start=fill algorithm.soup.snapshot.every=1 \
        algorithm.soup.prefix_length.max=256 $rollout.max_model_len=576 $rollout.ignore_eos=true \
        $rollout.enforce_eager=false $actor.ppo_mini_batch_size=8 $actor.ppo_max_token_len_per_gpu=9216 \
        $actor.optim.lr=1e-6 "$@"
fi

model=${SMOLLM2:-$PWD/runs/smollm2/model} data=$PWD/runs/smollm2/data
[ -e "$model/config.json" ] || python -m examples.smollm2.build_model --out "$model"
[ -e "$data/train.parquet" ] || python -m examples.smollm2.build_data --out "$data"
if [ "$check" = lab ]; then
    echo "== result"
    exec python -m benchmarks.lab_step algorithm="$kind" actor_rollout_ref.model.path="$model" \
        data.train_files="$data/train.parquet" data.val_files="$data/val.parquet" "$@"
fi
run=runs/gpu/$name metrics=runs/gpu/$name.jsonl
rm -rf "$run" "$metrics"
# Compiling takes longer than these few steps save.
smollm2=(
    example=smollm2 hydra.callbacks.console.log=null trainer.project_name=gpu trainer.experiment_name="$name"
    "${one_gpu[@]}" actor_rollout_ref.model.path="$model"
    data.train_files="$data/train.parquet" data.val_files="$data/val.parquet"
    data.train_batch_size=16 data.max_response_length=48 $rollout.max_model_len=112 $rollout.enforce_eager=true
    $actor.ppo_mini_batch_size=8 $actor.ppo_max_token_len_per_gpu=8192
    $actor.use_torch_compile=false $actor.fsdp_config.use_torch_compile=false
)

case $check in
exact)
    # The prompts of `replay` must come back.
    data_size=96 epochs=1
    [ "$kind" != replay ] || data_size=32 epochs=3
    # For `verify`; the run itself has them from precision=fp32.
    export TRITON_F32_DEFAULT=ieee TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0
    python -m verl.trainer.main_ppo algorithm=soup precision=fp32 "${smollm2[@]}" \
        algorithm.soup.source="$kind" algorithm.soup.lag=2 algorithm.soup.snapshot.every=1 \
        algorithm.soup.warm_start=pure algorithm.soup.prefix_length.max=16 \
        data.train_max_samples=$data_size trainer.total_epochs=$epochs trainer.total_training_steps=6 \
        trainer.save_freq=1 "$actor.checkpoint.save_contents=[hf_model]" "$@"
    echo "== result"
    python -m recipe.soup.verify --samples "$run/samples" --checkpoints "$run/checkpoints" --base-model "$model" \
        --mean 2e-5 --largest 2e-4 --apart 1e-2
    ;;
log-probs)
    # Ages from 1 to 16 in one run; the continuation is what age 0 is.
    python -m verl.trainer.main_ppo algorithm=soup "${smollm2[@]}" algorithm.soup.behavior_log_probs="$kind" \
        algorithm.soup.lag=1 algorithm.soup.schedules.lag.shape=linear algorithm.soup.schedules.lag.end=16 \
        algorithm.soup.schedules.lag.steps=20 algorithm.soup.warm_start=pure algorithm.soup.prefix_length.max=16 \
        data.train_max_samples=384 trainer.total_epochs=1 trainer.total_training_steps=24 "$@"
    echo "== result"
    python -m benchmarks.windows "$metrics" --every 4 \
        age=soup/train/prefix/lag/mean \
        "mismatch, mean=soup/train/continuation/engine_mismatch/mean" \
        "mismatch, max=soup/train/continuation/engine_mismatch/max" \
        "prefix clipped low=soup/loss/prefix/clip_fraction/low" \
        "prefix clipped high=soup/loss/prefix/clip_fraction/high" \
        "prefix ESS at start=soup/train/prefix/effective_sample_size_at_start" \
        "prefix KL (k3) at start=soup/train/prefix/kl_k3_at_start" \
        "continuation clipped low=soup/loss/continuation/clip_fraction/low" \
        "continuation clipped high=soup/loss/continuation/clip_fraction/high" \
        "continuation ESS=soup/loss/continuation/effective_sample_size" \
        "old log-probs, s=timing_s/old_log_prob"
    ;;
learn)
    # A smoke test of learning, no claim. Validation is never mixed.
    python -m verl.trainer.main_ppo algorithm="$kind" "${smollm2[@]}" data.train_batch_size=32 \
        $actor.ppo_mini_batch_size=16 data.train_max_samples=1920 trainer.total_epochs=1 \
        trainer.total_training_steps=60 trainer.val_before_train=true trainer.test_freq=20 data.val_max_samples=128 \
        $rollout.val_kwargs.n=4 "$@"
    echo "== result"
    python -m benchmarks.windows "$metrics" --every 10 \
        "validation accuracy=val-core/arithmetic/acc/mean@4" \
        "reward=critic/score/mean" "reward, pure samples=soup/train/reward/pure" \
        "groups with signal=soup/train/groups_with_signal" entropy=actor/entropy "seconds=timing_s/step"
    ;;
esac
