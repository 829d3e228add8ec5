"""Settings of every process that runs tests, and the fork server.

torch and transformers read the settings once, when they are imported.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from tests.support.forking import ForkServer

os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny: a second thread only waits


def pytest_configure(config: pytest.Config) -> None:
    """Give each process its own copies of exported models' code, as parallel tests write them too."""
    config.stash[_MODULES] = os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules_")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the copies."""
    shutil.rmtree(config.stash[_MODULES], ignore_errors=True)


_MODULES = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Start a process with Megatron and transformers imported, which forks others; for CPUs only."""
    with ForkServer() as server:
        yield server
