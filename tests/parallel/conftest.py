"""All comparisons share one base checkpoint, one data set, and one run on a single process."""

import pytest
import torch

from tests.support.retrofit import Workspace, make_base, make_data


@pytest.fixture(scope="session")
def workspace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Make a folder whose runs have forked ranks; on a machine with a GPU, torchrun starts the ranks."""
    server = None if torch.cuda.is_available() else request.getfixturevalue("fork_server")
    workspace = Workspace(tmp_path_factory.mktemp("retrofit"), server)
    make_base(workspace)
    make_data(workspace)
    return workspace


@pytest.fixture(scope="session")
def reference(workspace: Workspace) -> dict[str, list[float]]:
    """Return the curves of one process."""
    return workspace.run("reference", 1)
