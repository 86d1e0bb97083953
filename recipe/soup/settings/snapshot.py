"""`algorithm.soup.snapshot`: which past weights `source=snapshot` keeps and samples with."""

from typing import ClassVar, Literal

from recipe.soup.settings.group import Group, Number, Whole, key

POLICIES = ("lagged", "pool", "base", "best")
BY_AGE = ("lagged", "pool")


class SnapshotSettings(Group):
    """The snapshots that are kept, and the engine that samples with them. The paper says "an earlier checkpoint"."""

    path: ClassVar[str] = "algorithm.soup.snapshot"

    policy: str = key(
        "lagged",
        "Whose prefixes a step gets, one policy a step: the youngest snapshot that is at least `lag` updates old "
        "(`lagged`; with `every=1` exactly `lag`, as `lookahead`), one of those kept, drawn for each step (`pool`; "
        "with `placement=shared` up to 4 for each step, of which each prompt has one), "
        "version 0 (`base`), the version with the best mean validation score so far, taken in the step after its "
        "validation (`best`), or any checkpoint with safetensors of this architecture (a path or `owner/model`; with "
        "`placement=shared` the folder of a LoRA adapter for the same base model).",
        origin="paper: an earlier checkpoint",
        when="Only `lagged` heeds `lag` and `warm_start`; the versions of another run's tokens are -1.",
    )
    every: Whole = key(
        4, "Updates from one snapshot to the next.", ge=1, advice="a snapshot is taken every 1 or more updates."
    )
    keep: Whole | None = key(
        None, "How many snapshots are kept; null: as many as `lag` needs.", ge=1, advice="keep at least 1."
    )
    eviction: Literal["oldest", "log_spaced"] = key(
        "oldest",
        "Which snapshot goes when there are too many: the `oldest`, or one such that ages stay evenly spaced on a log "
        "scale (`log_spaced`).",
        when="`log_spaced` is for `policy=pool`.",
    )
    storage: Literal["memory", "disk"] = key(
        "memory",
        "Where snapshots lie: in Ray's object store (`memory`), or as safetensors under "
        "`trainer.default_local_dir/past_weights`, which all nodes must see (`disk`).",
        when="Checkpoints hold either kind (files are hard links where possible). `placement=shared` does not heed it: "
        "adapters are folders under `trainer.default_local_dir/past_adapters`, which all nodes must see.",
    )
    placement: Literal["colocated", "standalone", "shared"] = key(
        "colocated",
        "Where the engine that samples with them runs: on the trainer's GPUs, between rollout and update, asleep "
        "otherwise (`colocated`), or on `n_gpus` of its own, where it samples while the step before generates and "
        "trains (`standalone`); or none runs, and past versions are LoRA adapters in the current policy's engine "
        "(`shared`).",
        when="`shared` needs `actor_rollout_ref.model.lora_rank` above 0 and unmerged: docs/lora.md.",
    )
    n_gpus: Whole | None = key(None, "GPUs of a `standalone` engine; null: those of one replica.")
    gpu_memory_utilization: Number | None = key(
        None,
        "Share of a GPU that its engine plans with while it is awake, for weights, KV cache and activations; null: "
        "that of the rollout, and colocated nine tenths of it, since the rollout engine keeps something while it "
        "sleeps.",
        when="Prefixes need less cache than responses, so less will do; nothing heeds it with `hardware=cpu`.",
        gt=0,
        le=1,
        advice="a share lies above 0 and up to 1.",
    )
    max_num_seqs: Whole | None = key(
        None,
        "Responses that its engine decodes at once; null: the rollout's.",
        ge=1,
        advice="decode at least 1 at once.",
    )

    def needed(self, lag: int) -> int:
        """Snapshots that must be kept so that one is `lag` updates old when it is asked for."""
        # An engine of its own is asked a step ahead, before the current version is kept.
        ahead = 0 if self.placement == "shared" else 1
        return -(-max(lag - ahead, 0) // self.every) + 1
