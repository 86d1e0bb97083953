"""A temporary folder whose sockets would have too long a path."""

import inspect
from collections.abc import Callable
from pkgutil import resolve_name

import pytest
from omegaconf import DictConfig
from ray._private.utils import validate_socket_filepath
from refusals import sentence

from verl_ext.socket_paths import IN_SESSION, check_socket_paths

Compose = Callable[..., DictConfig]


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_folder_is_refused_where_ray_refuses_it(
    composed: Compose, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(variable, raising=False)
    config = composed("algorithm=grpo")
    check_socket_paths(config)
    for length in range(20, 80):
        folder = "/" + "t" * (length - 1)
        monkeypatch.setenv(name, folder)
        try:
            validate_socket_filepath(f"{folder}/ray/{IN_SESSION}")
        except OSError:
            text = sentence(check_socket_paths, config)
            assert text.startswith(f"{name}={folder}: Ray's sockets")
        else:
            check_socket_paths(config)
            longest = folder
    assert len(longest) < 79


def test_verls_own_folder_must_be_writable(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    assert sentence(check_socket_paths, composed("algorithm=grpo")).startswith("/tmp cannot be written")
    assert "ipc:///tmp/" in inspect.getsource(resolve_name("verl.workers.rollout.vllm_rollout.utils"))


def test_rays_own_key_counts_first(composed: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/" + "t" * 90)
    check_socket_paths(composed("algorithm=grpo", "+ray_kwargs.ray_init._temp_dir=/tmp/ray"))
    config = composed("algorithm=grpo", f"+ray_kwargs.ray_init._temp_dir=/{'t' * 90}")
    assert sentence(check_socket_paths, config).startswith("ray_kwargs.ray_init._temp_dir=/ttt")
