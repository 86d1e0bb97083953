"""Hydra callbacks that run the checks before verl's main function, hence before Ray and any model."""

from collections.abc import Callable
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from verl_ext.plugin.callbacks import require_supported_verl


def _check(check: Callable[[DictConfig], object], config: DictConfig) -> None:
    try:
        check(config)
    except Exception as error:  # Hydra would only warn, and the run would start unchecked
        raise SystemExit(f"The config could not be checked ({error!r}): this is a bug of ours.") from error


class RefuseWrongConfig(Callback):
    """Refuse, in one sentence, a config that SOUP cannot honour."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        require_supported_verl()
        from recipe.soup.checks.config import check_config
        from recipe.soup.checks.verification import check_lab_only
        from recipe.soup.run_settings import what_auto_means

        _check(check_config, config)
        _check(check_lab_only, config)
        if line := what_auto_means(config):
            print(line, flush=True)


class RefuseWhatCannotRun(Callback):
    """Refuse, in one sentence, what verl would stumble over minutes later, whatever the algorithm."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        from recipe.soup.checks.sweeps import check_sweep

        _check(check_sweep, config)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        require_supported_verl()
        from recipe.soup.checks.start import check_start

        _check(check_start, config)


class RefuseWrongSettings(Callback):
    """Refuse, in one sentence, what the twin cannot honour either: under `algorithm.soup`, and of agent loops."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        from recipe.soup.checks.loops import check_loops
        from recipe.soup.checks.resume import check_under_way
        from recipe.soup.run_settings import run_settings

        _check(run_settings, config)
        _check(check_loops, config)
        _check(lambda config: check_under_way(config, run_settings(config)), config)
