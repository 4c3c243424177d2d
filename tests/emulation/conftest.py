import shutil

import pytest


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    from emulation.build import build

    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return build(tmp_path_factory.mktemp("emulation"))
