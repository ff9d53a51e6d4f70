"""A real JupyterLab and a real Chromium. What is missing skips these tests with a sentence."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # that anything may take on a loaded machine
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

sys.path.insert(0, str(ROOT / "tests" / "ablation"))  # the small finished sweep that those tests are made of
sys.path.insert(0, str(ROOT / "tests" / "browser"))  # pages of JupyterLab


@pytest.fixture(scope="session")
def program() -> str:
    """A browser's path; everything else here asks for it, so that nothing is made in vain where it is missing."""
    pytest.importorskip("playwright.sync_api", reason="These tests drive a browser with playwright, which is not installed.")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("These tests need a Chromium, and there is none on this machine.")
    return found


# Not for the session: while playwright runs, the main thread has an event loop that runs, in which other tests could start none.
@pytest.fixture(scope="module")
def chromium(program: str) -> Iterator[Any]:
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def jupyter(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and folder of a JupyterLab that knows nothing of the settings and the kernels of this machine's owner."""
    home = tmp_path_factory.mktemp("jupyter").resolve()
    notebooks, settings = home / "notebooks", home / "settings" / "@jupyterlab" / "apputils-extension"
    notebooks.mkdir()
    settings.mkdir(parents=True)
    # Else the first page asks whether it may fetch news.
    (settings / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    places = {
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
    }
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {name: str(home / place) for name, place in places.items()} | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={notebooks}"]
    command += ["--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]
    with open(home / "server.log", "wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield _address(server, home), notebooks
    finally:
        server.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(SECONDS)
        _end_all(home)


def _address(server: subprocess.Popen[bytes], home: Path) -> str:
    """Once it listens, the server writes down where: it takes another port than it was asked to if that one is taken."""
    end = time.monotonic() + SECONDS
    while server.poll() is None and time.monotonic() < end:
        for path in home.glob("runtime/jpserver-*.json"):
            with contextlib.suppress(ValueError):  # half written
                return f"http://127.0.0.1:{json.loads(path.read_text())['port']}"
        time.sleep(0.05)
    raise AssertionError(f"JupyterLab did not start:\n{(home / 'server.log').read_text()[-3000:]}")


def _end_all(home: Path) -> None:
    """Ends the server, its kernels and the trainings, which outlive both: the processes that have this folder in their command."""
    for process in psutil.process_iter(["cmdline"]):
        if any(str(home) in word for word in process.info["cmdline"] or []):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture(scope="session")
def rendered_sweep(program: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small finished sweep with its page; to be read only."""
    from answered import rendered

    return rendered(tmp_path_factory.getbasetemp())
