"""Hydra callback of `algorithm=soup`: the last moment before verl's main function, hence before Ray and any model."""

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from verl_ext.callbacks import require_supported_verl


class RefuseWrongConfig(Callback):
    """Refuse, in one sentence, a config that SOUP cannot honour."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        require_supported_verl()
        from recipe.soup.refusals import check_config

        check_config(config)
