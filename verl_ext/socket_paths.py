"""Whether the paths of Ray's sockets fit: the kernel takes 107 bytes, and a long TMPDIR leaves too few."""

import os

from omegaconf import DictConfig, OmegaConf

from verl_ext.placement import cluster_address

LIMIT = 107
"""Bytes of the path of a Unix socket."""
WEIGHTS = "/tmp"
"""Where verl's socket for weights is, whatever TMPDIR says."""
LONGEST_PID = 7
"""Digits."""
IN_SESSION = f"session_2026-01-01_00-00-00_000000_{'0' * LONGEST_PID}/sockets/plasma_store"


def check_socket_paths(config: DictConfig) -> None:
    """Refuse a temporary folder with too long a path for the sockets of a Ray that the run starts itself.

    Raises:
        SystemExit: variable, value, what is wrong and what to do.
    """
    if cluster_address(config) is not None:
        return
    if not os.access(WEIGHTS, os.W_OK | os.X_OK):
        raise SystemExit(
            f"{WEIGHTS} cannot be written, but verl hands weights to vLLM through a socket there; mend it."
        )
    given = OmegaConf.select(config, "ray_kwargs.ray_init._temp_dir")
    names = [name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ]
    if given is not None:
        key, folder = "ray_kwargs.ray_init._temp_dir", str(given)
        path = os.path.join(folder, IN_SESSION)
    elif names:
        key, folder = names[0], os.environ[names[0]]
        path = os.path.join(folder, "ray", IN_SESSION)
    else:
        return
    over = len(path.encode()) - LIMIT
    if over > 0:
        why = f"Ray's sockets are in it, and their paths would have {over} bytes too many (the limit is {LIMIT})"
        raise SystemExit(f"{key}={folder}: {why}; set RAY_TMPDIR to a short path, e.g. /tmp.")
