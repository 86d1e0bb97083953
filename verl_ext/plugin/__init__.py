"""The `verl.plugins` entry point: verl imports this module in every process that imports verl.

It must cost next to nothing and must not fail (verl swallows a plugin's exception at DEBUG level), so it only arms
hooks: a recipe's module is imported when verl imports the module that it extends, and the CPU platform is registered
only if it was asked for.
"""

import importlib
import os
import sys
from functools import partial
from importlib.metadata import entry_points
from types import ModuleType

import wrapt

from verl_ext.cpu import CPU_ENV, cpu_requested
from verl_ext.plugin.resolvers import register_resolvers

REGISTRATIONS = "verl_ext.registrations"
OWN = {
    "verl.utils.torch_functional": "verl_ext.logits_in_pieces",
    "verl.workers.engine.fsdp.transformer_impl": "verl_ext.padded_batches",
}
"""What this package adds to modules of verl by itself, in the form of the entry points."""


def _import_extension(extension: str, _: ModuleType) -> None:
    importlib.import_module(extension)


def arm_registrations() -> None:
    """Make each recipe module be imported right after the verl module that it extends, and never before."""
    registered = [(entry.name, entry.value) for entry in entry_points(group=REGISTRATIONS)]
    for module, extension in [*OWN.items(), *registered]:
        wrapt.register_post_import_hook(partial(_import_extension, extension), module)


register_resolvers()
if cpu_requested(sys.argv, os.environ):
    os.environ.update({key: value for key, value in CPU_ENV.items() if key not in os.environ})
    from verl_ext.cpu.process import prepare_process

    prepare_process()
arm_registrations()
