from __future__ import annotations

from pathlib import Path

import pytest
from made_up_comparison import make_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return make_config(tmp_path)
