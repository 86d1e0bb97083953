"""The keys of `algorithm.soup` that concern any run of ours, with or without prefixes."""

from typing import Literal

from recipe.soup.settings.group import Group, Number, Whole, key


class RunSettings(Group):
    """Keys that stand at the top of `algorithm.soup`; the twin `algorithm=grpo` has them as well."""

    dump_rows: Whole | None = key(
        None,
        "Samples of a step that `trainer.rollout_data_dir` gets at most, whole prompts of a random choice; null: all.",
        when="Long responses: a token takes about 30 bytes of disk. The step waits for the samples' arrays only; text "
        "and JSON are made beside it (measured: benchmarks/results/dump.md).",
        ge=1,
        advice="use 1 or more samples a step, or null for all.",
    )
    max_lost_share: Number = key(
        0.05,
        "A step that lost a larger share of the samples it asked for, because generation or reward raised or the "
        "reward was not one finite number, ends the run and names the first error; verl drops the samples that raised, "
        "and trains on the rest. A step, or a validation, that lost all of them ends it in any case.",
        when="With rewards from 0 to 1 a step's mean reward is off by 0.05 at most, whichever samples were lost. Raise "
        "it for a grader whose failures have nothing to do with the response (a service that times out); a grader that "
        "fails on some responses should give them a reward instead.",
        ge=0,
        le=1,
        advice="a share lies between 0 (none) and 1 (all).",
    )

    broken_steps: Literal["stop", "warn"] = key(
        "stop",
        "What happens at a step whose loss or gradient is not finite, in which no token has a loss, or after which the "
        "engine still has the weights of an earlier step: the run ends with a sentence, or goes on, tells of each kind "
        "once and counts (`soup/train/broken/*`). verl goes on without a word.",
        when="`warn` for a run that is worth more than a step now and then; such a step trains nothing.",
    )

    max_wait: Number | None = key(
        1800.0,
        "A step, or a validation, in which no sample has come for so many seconds ends the run, and the sentence says "
        "which reward is still being computed; null: wait for ever, as verl does.",
        when="Longer than the longest time that one response takes, with its reward. A reward that asks a server needs "
        "a time limit of its own, far below.",
        gt=0,
        advice="give seconds, or null to wait for ever.",
    )
    sigterm_grace: Number = key(
        0.0,
        "Seconds that SIGTERM leaves a run to end its step and save a checkpoint; 0: it ends at once.",
        when="Under SLURM, with `#SBATCH --signal=B:TERM@600`; see docs/clusters.md.",
        ge=0,
        advice="give seconds, 0 or more.",
    )

    pass_k: Whole = key(
        4,
        "The k of `algorithm.adv_estimator=pass_at_k`: samples are rewarded for what they add to pass@k.",
        origin="pass@k training (arXiv 2508.10751); 4 of 8 samples is our choice",
        when="A rival of mixing: it asks for diversity by the advantage. At most `rollout.n`.",
        ge=1,
        advice="use 1 or more samples.",
    )
