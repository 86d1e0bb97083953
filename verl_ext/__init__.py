"""What verl lacks and any recipe could use: plugin entry point, Hydra groups, CPU platform, health checks.

Nothing in this package knows of SOUP. Recipes hook in through the entry-point groups `verl_ext.configs` and
`verl_ext.registrations` (see setup.py).
"""

__version__ = "0.1.0"
