"""Settings of every process that runs tests: torch and transformers read them once, when imported."""

import os
import shutil
import tempfile

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: a second thread only waits


def pytest_configure(config: pytest.Config) -> None:
    """Give each process its own copies of exported models' code, as parallel tests write them too."""
    config.stash[_MODULES] = os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules_")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the copies."""
    shutil.rmtree(config.stash[_MODULES], ignore_errors=True)


_MODULES = pytest.StashKey[str]()
