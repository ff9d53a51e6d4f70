"""Make or update the virtual environment: torch by its exact pin first, then this project and its extras at the locked versions.

Standard library only, for this runs before anything is installed. A stamp inside the environment says what it was made from and is
marked ready last: when it fits, nothing is done; when a set-up was interrupted, the environment is made anew.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = ".longcat_lab_stamp.json"
OLDEST = (3, 11)


class SetupError(Exception):
    """One sentence for the person at the terminal."""


def pinned(lock: Path, name: str) -> str:
    """The exact version of `name` in the lock."""
    found = re.search(rf"^{re.escape(name)}==(\S+)", lock.read_text(), re.MULTILINE)
    if not found:
        raise SetupError(f"{lock.name} has no line {name}==…: restore it, or write it anew with `make lock`.")
    return found[1]


def fingerprint(root: Path, lock: Path, extras: str) -> dict[str, str]:
    """What the environment is made from; the folder too, since scripts and the editable install hold its path."""
    sources = hashlib.sha256(b"\0".join([(root / "pyproject.toml").read_bytes(), lock.read_bytes(), extras.encode()]))
    return {"sources": sources.hexdigest(), "folder": str(root), "python": "{}.{}".format(*sys.version_info)}


def python_of(venv: Path) -> str:
    """`major.minor` of the environment's Python, or an empty string when it does not start or is not in an environment."""
    code = "import sys; print('%d.%d' % sys.version_info[:2] if sys.prefix != sys.base_prefix else '')"
    try:
        out = subprocess.run([venv / "bin" / "python", "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return out.stdout.strip() if out.returncode == 0 else ""


def decide(venv: Path, wanted: dict[str, str]) -> tuple[str, str]:
    """('ready' | 'create' | 'recreate' | 'update', why) for the environment as it is."""
    if not venv.exists() and not venv.is_symlink():
        return "create", ""
    if not venv.is_dir() or (any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists() and not (venv / STAMP).exists()):
        raise SetupError(f"{venv} is there but is no virtual environment: move it away, or choose another place with `make VENV=…`.")
    stamp: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        stamp = json.loads((venv / STAMP).read_text())
    if (venv / STAMP).exists() and stamp.get("state") != "ready":
        return "recreate", "its last set-up did not finish"
    version = python_of(venv)
    if not version:
        return "recreate", "its Python does not start"
    if version != wanted["python"]:
        return "recreate", f"it was made with Python {version}, not {wanted['python']}"
    if not stamp:
        return "update", "it was not made by this Makefile"
    if stamp.get("folder") != wanted["folder"]:
        return "recreate", "the folder has moved"
    if stamp.get("sources") != wanted["sources"]:
        return "update", "pyproject.toml or constraints.txt has changed"
    return "ready", ""


def write_stamp(venv: Path, wanted: dict[str, str], state: str) -> None:
    part = venv / (STAMP + ".part")
    part.write_text(json.dumps({**wanted, "state": state}, indent=1) + "\n")
    part.replace(venv / STAMP)


class Phases:
    """One line a phase, with the seconds it took (on a terminal they count up); what the command says is kept, its end shown on failure."""

    def __init__(self, total: int, log: Path):
        self.total, self.n, self.log = total, 0, log
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")

    def run(self, what: str, command: list, failure: str) -> None:
        self.n += 1
        line = f"[{self.n}/{self.total}] {what} "
        print(line, end="", flush=True)
        start, live = time.monotonic(), sys.stdout.isatty()
        offset = self.log.stat().st_size
        with self.log.open("a") as log:
            child = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            while True:
                try:
                    code = child.wait(timeout=1 if live else None)
                    break
                except subprocess.TimeoutExpired:
                    print(f"\r{line}… {time.monotonic() - start:.0f} s", end="", flush=True)
        except BaseException:  # Ctrl-C or SIGTERM: no child of ours outlives us
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=10)
            child.kill()
            raise
        print(f"{chr(13) + line if live else ''}… {time.monotonic() - start:.0f} s", flush=True)
        if code:
            said = self.log.read_bytes()[offset:].decode(errors="replace").splitlines()
            print("\n".join(said[-15:]), file=sys.stderr)
            raise SetupError(f"{failure} (all it said: {self.log.relative_to(ROOT)})")


def oracles(root: Path) -> list[str]:
    """Requirements of the group of that name in pyproject.toml: what tests hold against the code, and nothing else needs."""
    return tomllib.loads((root / "pyproject.toml").read_text()).get("dependency-groups", {}).get("oracles", [])


def install(venv: Path, lock: Path, extras: str, action: str, wanted: dict[str, str]) -> None:
    torch = pinned(lock, "torch")
    count = sum(1 for line in lock.read_text().splitlines() if "==" in line and not line.startswith("#"))
    pip = [venv / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--no-input"]
    add = [*pip, "install", "--progress-bar", "off"]
    failed = "pip could not finish: mend what it says above and run the same command again."

    phases = Phases(4 if action != "update" else 3, ROOT / ".cache" / f"setup-{venv.name}.log")
    venv.mkdir(parents=True, exist_ok=True)
    write_stamp(venv, wanted, "installing")  # first, so that an interruption from here on is seen
    if action == "recreate":
        for old in venv.iterdir():
            if old.name != STAMP:
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    if action != "update":
        phases.run(
            f"virtual environment with Python {sys.version.split()[0]} (seconds)",
            [sys.executable, "-m", "venv", venv],
            f"{sys.executable} cannot make virtual environments; on Debian and Ubuntu: apt install python{wanted['python']}-venv",
        )
    elif subprocess.run([*pip, "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        subprocess.run([venv / "bin" / "python", "-m", "ensurepip"], stdout=subprocess.DEVNULL)  # an environment made without pip
    phases.run(f"torch {torch} (half a minute to minutes: 0.2 GB for processors, gigabytes with CUDA)", [*add, f"torch=={torch}"], failed)
    phases.run(
        f"longcat_lab[{extras}] and what it needs, at most {count} packages at the versions of {lock.name} (1 to 4 minutes)",
        [*add, "--no-build-isolation", "--constraint", lock, "--editable", f"{ROOT}[{extras}]", *oracles(ROOT)],
        failed,
    )
    phases.run("checking that the installed packages fit together", [*pip, "check"], "The installed packages disagree.")
    write_stamp(venv, wanted, "ready")


def main() -> int:
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("--venv", type=Path, default=ROOT / ".venv")
    arg.add_argument("--lock", type=Path, default=ROOT / "constraints.txt")
    arg.add_argument("--extras", default="notebook,dev,slurm", help="comma-separated extras of pyproject.toml")
    args = arg.parse_args()
    if sys.version_info < OLDEST:
        raise SetupError(f"longcat_lab needs Python {OLDEST[0]}.{OLDEST[1]} or newer, and this is {sys.version.split()[0]}.")
    if not args.lock.is_file():
        raise SetupError(f"{args.lock} is missing: restore it (`git checkout -- {args.lock.name}`) or write it anew with `make lock`.")
    venv, lock = args.venv.absolute(), args.lock.resolve()
    wanted = fingerprint(ROOT, lock, args.extras)
    if decide(venv, wanted)[0] == "ready":
        return 0

    guard = ROOT / ".cache" / f"setup-{venv.name}.lock"
    guard.parent.mkdir(parents=True, exist_ok=True)
    with guard.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another set-up of this environment is running; waiting for it.", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        action, why = decide(venv, wanted)
        if action == "ready":
            return 0
        shown = os.path.relpath(venv)
        told = {"create": f"Making {shown}.", "recreate": f"Making {shown} anew: {why}.", "update": f"Updating {shown}: {why}."}
        print(told[action], flush=True)
        start = time.monotonic()
        install(venv, lock, args.extras, action, wanted)
        print(f"{shown} is ready after {time.monotonic() - start:.0f} s.", flush=True)
    return 0


def on_sigterm(*_):
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        sys.exit(main())
    except SetupError as error:
        print(f"\nset-up: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nset-up: interrupted; the same command starts it again.", file=sys.stderr)
        sys.exit(130)
