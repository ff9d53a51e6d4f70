"""Makes the modules beside the tests importable, whatever the import mode; and a sweep with its page, made once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def rendered_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `answered.answered`, rendered; to be read only."""
    from answered import rendered

    return rendered(tmp_path_factory.getbasetemp())
