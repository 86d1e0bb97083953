"""Refuse places that cannot be written or resumed, and trackers that are not there.

verl finds these out when it first saves, logs or loads: after minutes of training, or none.
"""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from recipe.soup.checks.sizes import validates
from recipe.soup.errors import refuse
from recipe.soup.records.earlier_runs import TRACKER as TRACKER_FILE
from recipe.soup.records.earlier_runs import check_free
from verl_ext.placement import cluster_address

TRACKERS = {
    "console": None,
    "file": None,
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "vemlp_wandb": "volcengine_ml_platform",
    "clearml": "clearml",
    "trackio": "trackio",
    "rl_insight": "rl_insight",
    "tracking": "wandb",
}
"""verl's, and the module that each needs."""
WANDB_NEEDS_NO_KEY = ("offline", "disabled", "dryrun")
TRACKER = "trainer.logger"
NEEDED = ("trainer.default_local_dir",)


def check_outputs(config: DictConfig) -> None:
    """Check where the run writes, what it goes on with, and whom it tells.

    Raises:
        SystemExit: key, value, what is wrong and what to do.
    """
    trainer = config.trainer
    places = {
        "trainer.default_local_dir": trainer.save_freq > 0,
        "trainer.rollout_data_dir": True,
        "trainer.validation_data_dir": validates(config),
    }
    for key, used in places.items():
        folder = OmegaConf.select(config, key)
        if not isinstance(folder, str | None) or (key in NEEDED and not folder):
            raise refuse(key, folder, f"is no path; give a folder{'' if key in NEEDED else ', or null'}.")
        # On a cluster the trainer may run on another node.
        if used and folder and "://" not in str(folder) and cluster_address(config) is None:
            check_writable(key, Path(folder))
    if cluster_address(config) is None:
        check_free(config)
    check_resume(config)
    _check_weights_elsewhere(config)
    check_trackers(config)
    grace = OmegaConf.select(config, "algorithm.soup.sigterm_grace")
    if grace and trainer.save_freq <= 0:
        why = "saves a checkpoint at SIGTERM, and trainer.save_freq=-1 says that none is to be saved"
        raise refuse("algorithm.soup.sigterm_grace", grace, f"{why}; set trainer.save_freq, as high as you like.")


def _check_weights_elsewhere(config: DictConfig) -> None:
    """Refuse to start from what a run that starts anew puts aside."""
    key = "actor_rollout_ref.model.path"
    path, trainer = str(OmegaConf.select(config, key)), config.trainer
    own = Path(str(trainer.default_local_dir)).absolute()
    if trainer.resume_mode == "disable" and not trainer.val_only and own in Path(path).absolute().parents:
        why = f"lies in trainer.default_local_dir={own}, whose checkpoints a run that starts anew puts aside"
        raise refuse(key, path, f"{why}; give this run a trainer.experiment_name of its own.")


def check_writable(key: str, folder: Path) -> None:
    """Check that files can be made in a folder, or the folder itself.

    Raises:
        SystemExit: they cannot.
    """
    there = existing(folder)
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        why = f"nothing can be written there ({there}: {error.strerror})"
        raise refuse(key, folder, f"{why}; give a folder that you may write to.") from None


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next((place for place in (folder, *folder.parents) if place.exists()), Path("/"))


def check_resume(config: DictConfig) -> None:
    """Check the checkpoint that a run is to go on with.

    Raises:
        SystemExit: it is named wrongly, or not there.
    """
    trainer = config.trainer
    mode, path = trainer.resume_mode, trainer.get("resume_from_path")
    if mode not in ("disable", "auto", "resume_path"):
        raise refuse("trainer.resume_mode", mode, "choose one of disable, auto, resume_path.")
    if mode == "auto":
        _check_tracker(Path(str(trainer.default_local_dir)))
    if mode != "resume_path":
        return
    key = "trainer.resume_from_path"
    if not isinstance(path, str):
        raise refuse(key, path, "trainer.resume_mode=resume_path needs the folder of a checkpoint, .../global_step_N.")
    if "global_step_" not in path or not path.rsplit("global_step_", 1)[-1].isdigit():
        raise refuse(key, path, "verl reads the step off its end; give a folder global_step_N, without a / behind it.")
    if "://" not in path and not Path(path).is_dir():
        raise refuse(key, path, "no such folder; give a checkpoint, or trainer.resume_mode=disable to start anew.")


def _check_tracker(folder: Path) -> None:
    """Refuse a note of the last checkpoint that is torn, or names none: verl would end in the middle, or start anew."""
    tracker, key = folder / TRACKER_FILE, "trainer.default_local_dir"
    if not tracker.is_file():
        return
    text = tracker.read_text(errors="replace").strip()
    if text.isdigit() and (folder / f"global_step_{text}" / "actor").is_dir():
        return
    # verl writes it last but one.
    last = [path for name in ("data.pt", "lab.pt") for path in folder.glob(f"global_step_*/{name}")]
    whole = [path.parent for path in last if (path.parent / "actor").is_dir()]
    steps = sorted(int(path.name.removeprefix("global_step_")) for path in whole)
    cure = f"write {steps[-1]} into it" if steps else "there is no whole one, so remove it"
    raise refuse(key, folder, f"its {TRACKER_FILE} has {text or 'nothing'}, which is no whole checkpoint; {cure}.")


def check_trackers(config: DictConfig) -> None:
    """Check that each tracker exists, is installed, and needs no login that is not there.

    Raises:
        SystemExit: one of them would end the run when it first logs.
    """
    given = config.trainer.get("logger") or []
    for name in [given] if isinstance(given, str) else list(given):
        if name not in TRACKERS:
            raise refuse(TRACKER, name, f"verl has no such tracker; choose among {', '.join(TRACKERS)}.")
        module = TRACKERS[name]
        if module and find_spec(module) is None:
            raise refuse(TRACKER, name, f"{module} is not installed here; install it, or leave {name} out.")
        if module == "wandb" and not _wandb_may_log(config):
            why = "wandb has no key here, and would end the run when it first logs"
            raise refuse(TRACKER, name, f"{why}; run `wandb login`, set WANDB_MODE=offline, or leave {name} out.")


def _wandb_may_log(config: DictConfig) -> bool:
    """Whether wandb has a key, needs none, or is set up by files of its own."""
    given = OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env.env_vars") or {}
    if cluster_address(config) is not None or any(str(name).startswith("WANDB_") for name in given):
        return True  # where the trainer runs there may be a key
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in WANDB_NEEDS_NO_KEY:
        return True
    # Any of its other variables or files may bring a key or another server.
    ours = ("WANDB_ENTITY", "WANDB_PROJECT", "WANDB_DIR", "WANDB_NAME", "WANDB_MODE", "WANDB_SILENT", "WANDB_CONSOLE")
    if any(name.startswith("WANDB_") and name not in ours for name in os.environ):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    settings = (netrc, netrc.with_name("_netrc"), Path("~/.config/wandb/settings").expanduser(), Path("wandb/settings"))
    return any(file.exists() for file in settings)
