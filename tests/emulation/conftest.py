import shutil

import pytest


@pytest.fixture(scope="session")
def library():
    from emulation.build import built

    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return built()
