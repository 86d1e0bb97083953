"""Run a config in the lab: the real path's mathematics in one process, for studies of many runs on a small model.

    python -m recipe.soup.lab algorithm=soup example=countdown algorithm.soup.lag=64 trainer.total_training_steps=150

Takes verl's config with any overrides, and writes the same metrics as a run of verl, under the experiment's name with
`-lab` behind it. With `trainer.device=cuda`, verl's default, it runs on the GPU if torch sees one.
"""

import argparse
import os

import torch

from recipe.soup.verl_adapter.compose import composed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of torch; several runs beside each other want 1 each")
    parser.add_argument("overrides", nargs="+", help="as for python -m verl.trainer.main_ppo")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = composed(args.overrides)
    config.trainer.experiment_name += "-lab"  # never over the files of a run on the real path
    for key, value in config.ray_kwargs.ray_init.runtime_env.get("env_vars", {}).items():
        os.environ.setdefault(key, str(value))

    from recipe.soup.checks.config import check_config
    from recipe.soup.checks.loops import check_loops
    from recipe.soup.checks.start import IN_ANY_DRIVER
    from recipe.soup.lab.driver import Lab
    from recipe.soup.lab.refusals import check_lab_config
    from recipe.soup.records.earlier_runs import hold_all
    from verl_ext.health import RunEndedError

    check_lab_config(config)
    for check in IN_ANY_DRIVER.values():
        check(config)
    if config.algorithm.soup.mixed_share > 0 or config.actor_rollout_ref.actor.policy_loss.loss_mode == "soup":
        check_config(config)
    else:
        check_loops(config)
    hold_all(config)
    try:
        lab = Lab(config)
        print(f"The lab computes on: {lab.hardware.device.type}, {lab.hardware.dtype}.", flush=True)
        lab.fit()
    except RunEndedError:  # it has said why
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
