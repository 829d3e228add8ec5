"""One base checkpoint, one data set, and one run on a single process, for all comparisons."""

import pytest

from tests.support.retrofit import Workspace, make_base, make_data


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("retrofit"))
    make_base(workspace)
    make_data(workspace)
    return workspace


@pytest.fixture(scope="session")
def reference(workspace: Workspace) -> dict[str, list[float]]:
    return workspace.run("reference", 1)
