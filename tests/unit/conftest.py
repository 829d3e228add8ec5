"""Checkpoints that the conversion tests damage in every way."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf (Llama in three files), tied (Qwen3 in one) and megatron (the first, imported): never changed."""
    from megatron_dms.conversion import import_hf
    from tests.unit.conversion.test_models import make_llama, make_qwen3

    folder = tmp_path_factory.mktemp("originals")
    make_llama(folder / "hf")
    make_qwen3(folder / "tied")
    import_hf(folder / "hf", folder / "megatron")
    return folder


@pytest.fixture
def copies(originals: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    shutil.copytree(originals, tmp_path / "copies")
    return tmp_path / "copies"
