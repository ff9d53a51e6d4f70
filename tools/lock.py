"""Write constraints.txt: the exact version of every package behind pyproject.toml, proved by a clean install.

Standard library only. Keeps what the present lock says, but for the packages named in --upgrade ("all": every one).
Resolves for the oldest Python that is allowed, so that no version is locked which that Python refuses.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "constraints.txt"
OLDEST = "3.11.0"
ALONE = "npu"  # resolved by nobody but its users: installing it breaks `import torch` on other machines
# torch's builds for CUDA bring these, at the versions torch itself asks for; the lock is the same for every build.
CUDA = re.compile(r"nvidia-|cuda-|triton$")
HEADER = """\
# The lock: exact versions of every package behind pyproject.toml, all extras, for Python {oldest} and newer.
# Written by `make lock`; edit pyproject.toml instead. To use it: pip install torch=={torch}; pip install -c constraints.txt -e .[notebook]
# Not listed: the CUDA packages of torch's Linux builds (torch asks for them itself) and what only other systems or newer Pythons need.
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {canonical(n): v for n, v in (line.strip().split("==") for line in lines if "==" in line and not line.startswith("#"))}


def main() -> None:
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("--upgrade", nargs="*", default=[], help="packages to take at their newest version in range, or: all")
    arg.add_argument("--torch", help="exact version of torch (default: the locked one)")
    args = arg.parse_args()
    if not OLDEST.startswith("{}.{}.".format(*sys.version_info)):
        sys.exit(
            f"lock: this is Python {sys.version.split()[0]}; the lock is made with the oldest allowed: make lock PYTHON=python{OLDEST[:4]}"
        )

    described = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = described["project"]
    extras = project["optional-dependencies"]
    old = read_lock(LOCK)
    torch = args.torch or old.get("torch") or sys.exit("lock: say which torch: tools/lock.py --torch 2.13.0")
    alone = {canonical(n): v for n, v in (r.split("==") for r in extras[ALONE])}
    free = {canonical(n) for n in args.upgrade} | {"torch", *alone}
    kept = {} if "all" in free else {n: v for n, v in old.items() if n not in free}
    wanted = project["dependencies"] + [r for extra, rs in extras.items() if extra != ALONE for r in rs]
    wanted += described["dependency-groups"]["oracles"]
    wanted = [r for r in wanted if canonical(re.match(r"[\w.-]+", r)[0]) != "torch"] + [f"torch=={torch}"]

    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    venv = build / "lock-venv"
    shutil.rmtree(venv, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=build) as scratch:
        keep, report, pip = Path(scratch, "keep.txt"), Path(scratch, "report.json"), Path(scratch, "pip")
        keep.write_text("".join(f"{n}=={v}\n" for n, v in kept.items()))
        print(f"Resolving {len(wanted)} requirements for Python {OLDEST}, {len(kept)} packages kept (minutes) …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", pip], check=True)
        command = [pip / "bin/python", "-m", "pip", "install", "--progress-bar", "off", "--dry-run", "--report", report]
        command += [
            "--disable-pip-version-check",
            "--ignore-installed",
            "--target",
            Path(scratch, "target"),
            "--only-binary=:all:",
            "--python-version",
            OLDEST,
        ]
        resolved = subprocess.run([*command, "-c", keep, *wanted], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if resolved.returncode:
            print("\n".join(resolved.stdout.splitlines()[-20:]), file=sys.stderr)
            sys.exit("lock: no set of versions fits; let the packages that disagree move: make lock UPGRADE='NAME NAME' (or UPGRADE=all).")
        chosen = [item["metadata"] for item in json.loads(report.read_text())["install"]]
        found = {canonical(m["name"]): m["version"].split("+")[0] for m in chosen}
    found = {n: v for n, v in found.items() if not CUDA.match(n)} | alone

    new = build / "constraints.txt"
    new.write_text(HEADER.format(oldest=OLDEST, torch=torch) + "".join(f"{n}=={v}\n" for n, v in sorted(found.items())))
    print(f"{len(found)} packages; proving them by a clean install:", flush=True)
    names = ",".join(e for e in extras if e != ALONE)
    subprocess.run([sys.executable, ROOT / "tools/setup_env.py", "--venv", venv, "--lock", new, "--extras", names], check=True)
    listing = [venv / "bin/python", "-m", "pip", "list", "--format=json", "--exclude-editable"]
    frozen = subprocess.run(listing, capture_output=True, check=True)
    installed = {canonical(p["name"]): p["version"].split("+")[0] for p in json.loads(frozen.stdout)}
    installed = {n: v for n, v in installed.items() if not CUDA.match(n) and n != "pip"}
    differ = {n for n in installed.keys() | found.keys() if installed.get(n) != found.get(n)} - alone.keys()
    if differ:
        sys.exit(f"lock: what was installed is not what was locked: {', '.join(sorted(differ))}; the candidate is {new.relative_to(ROOT)}.")
    new.replace(LOCK)
    shutil.rmtree(venv)
    for name in sorted(old.keys() | found.keys()):
        if old.get(name) != found.get(name):
            print(f"  {name}: {old.get(name, 'new')} -> {found.get(name, 'gone')}")
    print("constraints.txt is written; now run `make test`.")


if __name__ == "__main__":
    main()
