"""Find and read the metrics that verl's file logger writes."""

import json
import os
from itertools import count
from pathlib import Path
from statistics import mean

from omegaconf import DictConfig, OmegaConf

from recipe.soup.errors import refuse
from recipe.soup.records.json_lines import NUMBER, read_json_lines

FORM = {"step": int, "data": dict}
KIND = "what verl's file logger wrote (trainer.logger=[console,file])"


def metrics_file(config: DictConfig) -> Path:
    """Return the path at which verl's file logger writes a run's metrics."""
    told = OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env.env_vars") or {}
    environ = {**os.environ, **told}
    if path := environ.get("VERL_FILE_LOGGER_PATH"):
        return Path(path)
    root = Path(environ.get("VERL_FILE_LOGGER_ROOT", ".")).expanduser()
    return root / config.trainer.project_name / f"{config.trainer.experiment_name}.jsonl"


def trackers(config: DictConfig) -> list[str]:
    """Return the names in `trainer.logger`, which may be one name."""
    logger = config.trainer.logger
    return [logger] if isinstance(logger, str) else list(logger)


def metrics_of(run: Path) -> Path:
    """Find the metrics of a run that is named by its metrics file or by its folder.

    Raises:
        SystemExit: there are none; the sentence says how a run writes them.
    """
    for path in (run, run.parent / f"{run.name}.jsonl", run / "metrics.jsonl"):
        if path.is_file():
            return path
    raise refuse("run", run, "no metrics there; a run writes them with trainer.logger=[console,file].")


def earlier_metrics(path: Path) -> Path:
    """Return the path of the metrics from before a run was resumed: verl's file logger begins its file anew."""
    return path.with_name(f"{path.name}.earlier")


def keep_earlier_metrics(path: Path, resumed_at: int) -> str | None:
    """Put aside the metrics up to the step that a run goes on from, before the file logger begins its file anew.

    Those of another run get a number. A file that cannot be read is put aside whole, since a run must not end for it.

    Args:
        path: the file that the file logger will write.
        resumed_at: step of the checkpoint; 0 if there is none, so that a file at `path` is another run's.

    Returns:
        a sentence for the user, if there is something to say.
    """
    earlier = earlier_metrics(path)
    if resumed_at == 0:
        numbered = (path.with_name(f"{path.stem}.{n}{path.suffix}") for n in count(1))
        free = next(new for new in numbered if not new.exists() and not earlier_metrics(new).exists())
        for file, new in ((path, free), (earlier, earlier_metrics(free))):
            if file.exists():
                file.replace(new)
    elif path.exists():
        try:
            found = read_metrics(path)
        except SystemExit as refusal:
            for file in (earlier, path):
                if file.exists():
                    file.replace(file.with_name(f"{file.name}.broken"))
            return f"{refusal} The run goes on, and its earlier metrics are put aside in {path}.broken."
        metrics = {step: values for step, values in found.items() if step <= resumed_at}
        lines = [json.dumps({"step": s, "data": data}) + "\n" for s, data in metrics.items()]
        part = earlier.with_name(f"{earlier.name}.part")  # a kill meanwhile must not cost what was there
        part.write_text("".join(lines), encoding="utf-8")
        part.replace(earlier)
    return None


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Read metrics by step, those from before the run was resumed included; step 0 is validation before training.

    Metrics that are no number, as null or text, are left out.

    Raises:
        SystemExit: a line is broken, or is not what verl's file logger writes.
    """
    metrics: dict[int, dict[str, float]] = {}
    earlier = earlier_metrics(path)
    for file in (earlier, path) if earlier.exists() else (path,):
        for row in read_json_lines(file, FORM, KIND):
            # A resumed run validates once more at the step that it goes on from, so that step has a second row.
            numbers = {key: value for key, value in row["data"].items() if isinstance(value, NUMBER)}
            metrics.setdefault(row["step"], {}).update(numbers)
    return metrics


def validation_accuracy(metrics: dict[int, dict[str, float]]) -> dict[int, float]:
    """Return the accuracy of unmixed validation, averaged over data sources, by the step after which it was taken."""
    found = {
        step: [value for key, value in values.items() if key.startswith("val-core/") and "/mean@" in key]
        for step, values in metrics.items()
    }
    return {step: mean(values) for step, values in found.items() if values}
