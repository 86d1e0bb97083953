"""Open config groups in verl's primary config, so that `algorithm=soup` works without a copy of that config.

verl's `ppo_trainer.yaml` has no group `algorithm`, and Hydra refuses an override of a group that the defaults list
does not name. The source below serves verl's own file with a few empty groups appended to its defaults list; as long
as none of them is chosen, the composed config is byte-identical to verl's.
"""

import sys
from importlib.metadata import entry_points
from importlib.util import find_spec

from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin

from verl_ext.plugin.resolvers import register_resolvers
from verl_ext.plugin.sweeps import refuse_swept_groups

GROUPS = ("algorithm", "precision", "hardware", "example")
"""The groups in their order: a later one's file wins over an earlier one's."""
PRIMARY = "ppo_trainer.yaml"
VERL_CONFIG = "verl.trainer.config"
CONFIG_PACKAGES = "verl_ext.configs"


class OpenGroupsSource(ConfigSource):
    """Serves one file: verl's primary config, with our groups opened."""

    @staticmethod
    def scheme() -> str:
        return "verl-ext"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path == ""

    def is_config(self, config_path: str) -> bool:
        return self._normalize_file_name(config_path) == PRIMARY

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []

    def load_config(self, config_path: str) -> ConfigResult:
        if not self.is_config(config_path):
            raise ConfigLoadError(f"Config not found : {config_path}")
        result = ImportlibResourcesConfigSource("verl", f"pkg://{VERL_CONFIG}").load_config(config_path)
        result.provider, result.path = self.provider, self.full_path()
        result.config["defaults"].extend([{group: None} for group in GROUPS])  # pyright: ignore[reportArgumentType]
        return result


class VerlGroups(SearchPathPlugin):
    """Adds the source and every package of the entry-point group `verl_ext.configs` to verl's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if not any(_is_verl_config(element.path) for element in search_path.get_path()):
            return  # another Hydra application in the same environment
        refuse_swept_groups(sys.argv[1:], GROUPS)
        register_resolvers()
        search_path.prepend(provider="verl_ext", path=f"{OpenGroupsSource.scheme()}://")
        for entry in entry_points(group=CONFIG_PACKAGES):
            if _is_importable(entry.value):  # a clone has the examples, a wheel has not
                search_path.append(provider=entry.name, path=f"pkg://{entry.value}")


def _is_importable(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _is_verl_config(path: str | None) -> bool:
    return path is not None and path.rstrip("/").replace(".", "/").endswith(VERL_CONFIG.replace(".", "/"))
