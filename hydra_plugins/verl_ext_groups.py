"""Hydra finds plugins only under `hydra_plugins`; the code is in `verl_ext.plugin.hydra_source`."""

from verl_ext.plugin.hydra_source import OpenGroupsSource, VerlGroups

__all__ = ["OpenGroupsSource", "VerlGroups"]
