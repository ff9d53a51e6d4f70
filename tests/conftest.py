"""Shared by all tests: one thread, one cache of prepared text for the session, seeded random numbers."""

import os
import zlib

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
# No time limit for an example: these tests run side by side on machines that do other things too.
settings.register_profile("lab", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("lab")


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory):
    """Text is prepared once a session (and once for all workers when the environment names a cache)."""
    if "LONGCAT_LAB_CACHE" not in os.environ:
        os.environ["LONGCAT_LAB_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return os.environ["LONGCAT_LAB_CACHE"]


@pytest.fixture(autouse=True)
def fresh_numbers(request):
    """Each test has its own random inputs, the same ones each time it runs."""
    import torch

    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def fresh_registry(tmp_path, monkeypatch):
    """Kinds and plugins as they were when the test began, and a working folder of its own."""
    from longcat_lab.blocks import interface
    from longcat_lab.config import plugins

    kinds, defaults = interface.kinds(), dict(interface._DEFAULTS)
    monkeypatch.setattr(plugins, "_IMPORTED", {})
    monkeypatch.setattr(plugins, "_AT", {})
    monkeypatch.chdir(tmp_path)
    yield
    for known, before in ((interface._KINDS, kinds), (interface._DEFAULTS, defaults)):
        known.clear()
        known.update(before)
