"""One update of verl's training worker on the recorded batch, shared by the ranks that torchrun started.

torchrun --nproc-per-node 2 tests/support/two_ranks.py result.pt algorithm.soup.ratio=shaped
"""

import os
import sys

os.environ.update(VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="cuda", RAY_LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"])

import torch
import transfer_queue as tq
from compose import compose_config
from training_worker import COUNTDOWN, Store, WorkerGroup, make_trainer, recorded
from transfer_queue import KVBatchMeta

from recipe.soup.algorithm.loss_metrics import PREFIX
from recipe.soup.verl_adapter.trainer import SoupTrainer


def main(result: str, *overrides: str) -> None:
    store = Store()
    tq.kv_batch_get, tq.kv_batch_put = store.get, store.put
    one_mini_batch = "actor_rollout_ref.actor.ppo_mini_batch_size=8"
    config = compose_config(*COUNTDOWN, "algorithm=soup", one_mini_batch, *overrides)
    group = WorkerGroup(config, store)
    trainer = make_trainer(SoupTrainer, config, group)
    trainer._install_loss()
    metrics: dict = {}
    batch = trainer._compute_old_log_prob(recorded(store), metrics)
    batch = trainer._compute_advantage(batch, metrics)
    # Ranks get unequal numbers of tokens, of prompts and of prefixes.
    keys = sorted(batch.keys, key=lambda key: len(store.rows[key]["responses"]))
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = keys[rank * len(keys) // ranks : (rank + 1) * len(keys) // ranks]
    tags = [store.tags[key] for key in share]
    own = KVBatchMeta(partition_id="train", keys=share, tags=tags, extra_info=dict(batch.extra_info or {}))
    passes: list[int] = []
    group.worker.actor.engine.module.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    trainer._update_actor(own, metrics)
    largest = torch.tensor(max(passes))
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    optimizer = group.worker.actor.engine.optimizer
    # Adam's first moment after one step: the gradient, up to a factor.
    gradient = torch.cat(
        [optimizer.state[p]["exp_avg"].full_tensor().flatten() for p in optimizer.param_groups[0]["params"]]
    )
    if rank == 0:
        told = {name: float(value) for name, value in metrics.items() if name.startswith(PREFIX)}
        torch.save({"gradient": gradient, "metrics": told, "largest": int(largest)}, result)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
