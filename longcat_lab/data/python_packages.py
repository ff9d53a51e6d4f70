"""Real text without a download: the Python source of the standard library and of installed distributions.

Which packages. `packages: null` takes the standard library and every installed distribution that longcat_lab requires, directly or
through others, with all its extras that are installed (but `slurm`). Where longcat_lab runs from a checkout and is not installed,
the requirements of torch, tokenizers and pandas stand in for its own. What else a machine has installed does not change the text.

Which files. Those a distribution's RECORD lists; for the standard library, the .py files under its folder. Left out:

- test suites: tables of cases that repeat each other, more than half of some packages;
- vendored copies: another package's text under this one's name, which could carry a held-out package into training;
- generated text: the standard library's character maps and help topics, build settings (these also differ between machines).

Which order. By a hash of package and path, so that a byte cap takes a bit of every package; and no package fills more than its
share (`package_share`) of a split until the others have nothing left: torch alone is half of all the text.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from longcat_lab.config.data import DataConfig, PythonPackages
from longcat_lab.data.documents import OUT_OF_DISTRIBUTION, TRAIN, VALIDATION, Document, Tally, byte_caps
from longcat_lab.errors import LabError

OWN_NAME = "longcat-lab"
STDLIB = "stdlib"
ENGINES = "slurm"  # the extra that says where jobs run: the text must be the same on a cluster and beside it
STAND_IN_ROOTS = ("torch", "tokenizers", "pandas")
TEST_FOLDERS = {"test", "tests", "idle_test"}
VENDOR_FOLDERS = {"_vendor", "_vendored", "vendor", "vendored", "third_party", "_bundled"}
GENERATED_FOLDERS = {"encodings", "pydoc_data", "lib-dynload"}  # of the standard library
OTHER_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
LONGEST_FILE = 200_000  # bytes; longer ones are nearly all generated tables


class PackageSource:
    """Documents of `python_packages`: one per file, `package` is the distribution's name."""

    def __init__(self, config: DataConfig) -> None:
        source = config.source
        assert isinstance(source, PythonPackages)
        self.caps, self.share = byte_caps(config), source.package_share
        self.distributions: dict[str, metadata.Distribution] = {}
        held_out = {
            OUT_OF_DISTRIBUTION: self._named(source.out_of_distribution, "out_of_distribution") if self.caps[OUT_OF_DISTRIBUTION] else [],
            VALIDATION: self._named(source.validation, "validation"),
        }
        # Packages of another style stay out of training even where the split itself is switched off: the text must not depend on it.
        kept_out = {canonical(name) for name in [*source.out_of_distribution, *source.validation]}
        train = self._default() if source.packages is None else self._named(source.packages, "packages")
        self.packages = held_out | {TRAIN: [name for name in train if name not in kept_out]}
        if not self.packages[TRAIN]:
            raise LabError("data.source.packages: every package named there is held out, name one to train on.")

    def identity(self) -> dict[str, Any]:
        """Names and versions, not the files: an installed distribution's files do not change under its version."""
        return {
            "packages": self.packages,
            "package_share": self.share,
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "distributions": {name: self.distributions[name].version for name in sorted(self.distributions)},
        }

    def documents(self, tally: Tally) -> Iterator[Document]:
        for split, names in self.packages.items():
            yield from self._split(split, names, tally)

    def _split(self, split: str, names: list[str], tally: Tally) -> Iterator[Document]:
        files = sorted((_order(name, path), name, where) for name in names for path, where in self._files(name))
        allowed = max(self.share, 1 / max(len(names), 1)) * self.caps[split]
        used = dict.fromkeys(names, 0)
        deferred: list[tuple[str, Path]] = []
        for _, name, where in files:
            if used[name] >= allowed:
                deferred.append((name, where))
            elif (text := _read(where, tally)) is not None:
                used[name] += len(text.encode())
                yield Document(name, text, split)
        for name, where in deferred:
            if (text := _read(where, tally)) is not None:
                yield Document(name, text, split)

    def _files(self, name: str) -> list[tuple[str, Path]]:
        """(path inside the package, path on disk) of a package's usable .py files."""
        if name == STDLIB:
            root = Path(sysconfig.get_path("stdlib"))
            found = [(path.relative_to(root).as_posix(), path) for path in root.rglob("*.py")]
            return [(path, where) for path, where in found if _usable(path, GENERATED_FOLDERS)]
        distribution = self.distributions[name]
        files = [(file.as_posix(), Path(str(distribution.locate_file(file)))) for file in distribution.files or [] if file.suffix == ".py"]
        return [(path, where) for path, where in files if _usable(path, set())]

    def _named(self, names: list[str], key: str) -> list[str]:
        """Canonical names, each an installed distribution with Python files, or the standard library."""
        for name in dict.fromkeys(map(canonical, names)):
            if name == STDLIB:
                continue
            if not name:
                raise LabError(f"data.source.{key}: the list has an empty name; remove it, or write the name of an installed package.")
            try:
                self.distributions[name] = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                raise LabError(
                    f"data.source.{key}: the package '{name}' is not installed; install it, or name installed packages there."
                ) from None
        return list(dict.fromkeys(map(canonical, names)))

    def _default(self) -> list[str]:
        found = required_distributions()
        self.distributions |= found
        return [STDLIB, *sorted(found)]


def canonical(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    from packaging.utils import canonicalize_name

    return canonicalize_name(name)


def required_distributions() -> dict[str, metadata.Distribution]:
    """Installed distributions that longcat_lab requires, directly or not, by canonical name; without longcat_lab itself."""
    from packaging.requirements import Requirement

    try:
        own = metadata.distribution(OWN_NAME)
        extras = [extra for extra in own.metadata.get_all("Provides-Extra") or [] if extra != ENGINES]
        waiting = [(OWN_NAME, extra) for extra in ["", *extras]]
    except metadata.PackageNotFoundError:
        waiting = [(name, "") for name in STAND_IN_ROOTS]
    found: dict[str, metadata.Distribution] = {}
    done: set[tuple[str, str]] = set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        try:
            distribution = found.get(name) or metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # another platform's, or an extra that is not installed
        found[name] = distribution
        for line in distribution.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(canonical(requirement.name), wanted) for wanted in ["", *sorted(requirement.extras)]]
    found.pop(OWN_NAME, None)
    return found


def _order(package: str, path: str) -> str:
    return hashlib.sha256(f"{package}/{path}".encode()).hexdigest()


def _usable(path: str, excluded: set[str]) -> bool:
    parts = PurePosixPath(path).parts
    if ".." in parts or parts[-1].startswith("_sysconfigdata"):
        return False
    return not any(part in TEST_FOLDERS | VENDOR_FOLDERS | OTHER_FOLDERS | excluded for part in parts[:-1])


def _read(path: Path, tally: Tally) -> str | None:
    try:
        raw = path.read_bytes()
    except OSError:
        tally.skipped["unreadable"] += 1
        return None
    if not raw.strip():
        tally.skipped["empty"] += 1
        return None
    if len(raw) > LONGEST_FILE:
        tally.skipped["too long"] += 1
        return None
    try:
        return raw.decode()
    except UnicodeDecodeError:
        tally.skipped["not UTF-8"] += 1
        return None
