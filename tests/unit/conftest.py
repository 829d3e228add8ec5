"""What tests of several folders share: checkpoints to damage, and a process group of one."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make hf (Llama in three files), tied (Qwen3 in one file) and megatron (hf, imported); no test
    changes them."""
    from megatron_dms.conversion import import_hf
    from tests.support.hf_checkpoints import make_llama, make_qwen3

    folder = tmp_path_factory.mktemp("originals")
    make_llama(folder / "hf")
    make_qwen3(folder / "tied")
    import_hf(folder / "hf", folder / "megatron")
    return folder


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A process group of one and Megatron's parallel state, for the tests of a module."""
    from tests.support.mcore_cases import one_process

    with one_process():
        yield


@pytest.fixture
def copies(originals: Path, tmp_path: Path) -> Path:
    """Return copies of the originals, to be damaged."""
    shutil.copytree(originals, tmp_path / "copies")
    return tmp_path / "copies"
