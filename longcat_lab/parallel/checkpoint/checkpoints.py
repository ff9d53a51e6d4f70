"""The checkpoints of one run in its folder: saved by all of its processes, kept two deep, loaded into any layout."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from longcat_lab.errors import LabError
from longcat_lab.parallel.checkpoint.manifest import MANIFEST, Damaged, Manifest, check
from longcat_lab.parallel.checkpoint.processes import Processes, fail
from longcat_lab.parallel.checkpoint.storage import Planner, Reader, Writer, remove

KEPT = 2
OWN = "own"
_PREFIX = "checkpoint-"


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `load` found besides the tensors that it filled.

    own: what this process saved for itself; where there were fewer processes, what the one of this rank modulo their number saved.
    passed_over: which damaged checkpoints were left out, and why; None if the newest was whole.
    """

    step: int
    state: dict[str, Any]
    own: dict[str, Tensor]
    passed_over: str | None = None


@dataclasses.dataclass(frozen=True)
class _Chosen:
    path: Path
    manifest: Manifest
    passed_over: str | None


class Checkpoints:
    """Checkpoints in `folder`, which all processes see. Every method is called by all of them, in the same order.

    A checkpoint is written beside its place, checked into a manifest and renamed: whatever is killed at whatever moment, those that
    stand in the folder are whole. The newest two are kept, so that a disk that spoils one does not end a run.

    Args:
        identity: of the run. Another run's checkpoint is refused.
        group: the processes of the run, None for all (or the only one). They talk about checkpoints over a group of their own.
        asynchronous: `save` returns once the tensors are copied, and the rest is done while training goes on.
        timeout: seconds that a process waits for one that is alive but does not come; None takes torch's half hour.
    """

    def __init__(
        self, folder: Path, identity: str, group: dist.ProcessGroup | None = None, asynchronous: bool = False, timeout: float | None = None
    ) -> None:
        self.folder, self.identity, self.asynchronous = Path(folder), identity, asynchronous
        self.processes = Processes(group, timeout)
        self._background: Future[BaseException | None] | None = None
        self._writing: Path | None = None
        self._chosen: _Chosen | None = None
        self._damaged: set[Path] = set()

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], own: dict[str, Tensor] | None = None) -> None:
        """Writes `checkpoint-STEP`; a whole one that is there already stays as it is.

        Args:
            tensors: by names that are the same in every layout. A DTensor is written piece by piece; a plain tensor is the same on all
                processes that have its name. Processes may have different names (stages of a pipeline).
            state: plain data, the same on all processes; JSON.
            own: this process's own, such as the state of its random numbers.

        Raises:
            LabError: on all processes, where it, or the one before it that was written in the background, failed on any of them. The
                checkpoints before are whole.
        """
        self.wait()
        path = self.folder / f"{_PREFIX}{step:08d}"
        if self.processes.from_first(lambda: path.exists() and path not in self._damaged):
            return
        named = {name: tensor.detach() for name, tensor in tensors.items()}
        named |= {f"{OWN}/{self.processes.rank}/{name}": tensor.detach() for name, tensor in (own or {}).items()}
        manifest = Manifest(self.identity, step, self.processes.size, json.loads(json.dumps(state)), {}, {})
        writer = Writer(path, manifest, lambda: self._keep_newest(step))
        arguments = {"storage_writer": writer, "planner": Planner(), "process_group": self.processes.group}
        self._chosen, self._writing = None, path
        _silence()
        try:
            if self.asynchronous:
                self._background = self._settled(dcp.async_save(named, **arguments), writer)
            else:
                dcp.save(named, **arguments)
        except BaseException as error:
            self._tidy(writer)
            fail(error, f"writing {path}")

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong, once, on all processes."""
        if self._background is None:
            return
        error = self._background.result()
        self._background = None
        if error is not None:
            fail(error, f"writing {self._writing}")

    def latest_step(self) -> int:
        """Steps done in the newest whole checkpoint, 0 if there is none; `load` takes this one. Every byte of it is checked.

        Raises:
            LabError: there are checkpoints but none is whole, or the newest that is whole belongs to another run.
        """
        self.wait()
        chosen = self._choose()
        return chosen.manifest.step if chosen else 0

    def load(self, make: Callable[[dict[str, TensorStorageMetadata]], dict[str, Tensor]]) -> Restored | None:
        """Fills tensors from the newest whole checkpoint, in place; None if there is no checkpoint.

        Args:
            make: from what was saved (by name; `size`, `properties.dtype`) to the tensors to fill, with these names: any device, plain
                or DTensors on any mesh. Each name must be wanted by some process.

        Raises:
            LabError: as `latest_step`; or it holds other tensors than those wanted. Nothing has been filled then.
        """
        self.wait()
        chosen = self._choose()
        if chosen is None:
            return None
        if chosen.passed_over and self.processes.rank == 0:
            warnings.warn(chosen.passed_over, stacklevel=2)
        manifest, path = chosen.manifest, chosen.path
        names = [name for name in manifest.tensors if not name.startswith(f"{OWN}/")]
        saved = manifest.metadata(names).state_dict_metadata
        wanted = self.processes.together(lambda: _matching(make(saved), saved, path))
        self._check_all_wanted(names, wanted, path)
        prefix = f"{OWN}/{self.processes.rank % manifest.processes}/"
        mine = [name for name in manifest.tensors if name.startswith(prefix)]
        metadata = manifest.metadata([*names, *mine])
        entries = {name: metadata.state_dict_metadata[name] for name in mine}
        own = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        _silence()
        try:
            dcp.load({**wanted, **own}, storage_reader=Reader(path, metadata), planner=planner, process_group=self.processes.group)
        except BaseException as error:
            fail(error, f"reading {path}")
        return Restored(manifest.step, manifest.state, {name.removeprefix(prefix): own[name] for name in mine}, chosen.passed_over)

    def remove_all(self) -> None:
        """Takes all checkpoints away, as a finished run does."""
        with contextlib.suppress(LabError):  # what could not be written is not wanted any more
            self.wait()
        self._chosen = None
        if self.processes.rank == 0:
            for path in self._all():
                remove(path)

    def remove_leftovers(self) -> None:
        """What a killed run was writing or removing; the caller holds the folder's lock."""
        self.wait()
        if self.processes.rank == 0:
            for path in self.folder.glob(f".{_PREFIX}*.tmp"):
                shutil.rmtree(path, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal())

    def _keep_newest(self, step: int) -> None:
        """On the first process, after `step` took its place. What is newer was passed over, for it was damaged."""
        found = self._all()
        stale = [path for path in found if path in self._damaged or int(path.name.removeprefix(_PREFIX)) > step]
        stale = [path for path in stale if int(path.name.removeprefix(_PREFIX)) != step]
        for path in [*stale, *[path for path in found if path not in stale][:-KEPT]]:
            remove(path)
        self._damaged.clear()

    def _settled(self, saving: Future, writer: Writer) -> Future[BaseException | None]:
        """What went wrong in the background, once its space is free again."""
        settled: Future[BaseException | None] = Future()

        def settle(done: Future) -> None:
            if done.exception() is not None:
                self._tidy(writer)
            settled.set_result(done.exception())

        saving.add_done_callback(settle)
        return settled

    def _tidy(self, writer: Writer) -> None:
        """Frees the space of what could not be written."""
        if self.processes.rank == 0:
            shutil.rmtree(writer.temporary, ignore_errors=True)

    def _choose(self) -> _Chosen | None:
        """The newest whole checkpoint; the same on all processes."""
        if self._chosen is not None:
            return self._chosen
        passed: list[str] = []
        found = self.processes.from_first(self._all)
        for path in reversed(found):
            try:
                manifest = self._check(path)
            except Damaged as why:
                passed.append(f"{path.name} is damaged ({why})")
                self._damaged.add(path)
                continue
            if manifest.identity != self.identity:
                raise LabError(
                    f"{path} belongs to another run ({manifest.identity}, this one is {self.identity}): give another folder or delete it."
                )
            told = f"{self.folder}: {', '.join(passed)}; going on from {path.name}." if passed else None
            self._chosen = _Chosen(path, manifest, told)
            return self._chosen
        if found:
            raise LabError(f"{self.folder}: no checkpoint is whole: {', '.join(passed)}; delete them to start the run anew.")
        return None

    def _check(self, path: Path) -> Manifest:
        """The manifest of a checkpoint that is whole; each process reads a share of the files. Raises Damaged, on all."""

        def read() -> str | None:
            try:
                return (path / MANIFEST).read_text(encoding="utf-8")
            except (OSError, ValueError):
                return None

        text = self.processes.from_first(read)
        if text is None:
            raise Damaged(f"{MANIFEST} cannot be read")
        manifest, why = Manifest.parse(text), None
        try:
            for file in sorted(manifest.files)[self.processes.rank :: self.processes.size]:
                check(path, file, manifest.files[file])
        except Damaged as error:
            why = str(error)
        faults = [each for each in self.processes.gathered(why) if each is not None]
        if faults:
            raise Damaged(faults[0])
        return manifest

    def _check_all_wanted(self, names: list[str], wanted: dict[str, Tensor], path: Path) -> None:
        asked = self.processes.any(torch.tensor([name in wanted for name in names]))
        if not asked.all():
            name = names[int(asked.int().argmin())]
            raise LabError(f"{path}: this checkpoint holds {name}, which this run has not: give another folder or delete it.")


def _matching(wanted: dict[str, Tensor], saved: dict[str, TensorStorageMetadata], path: Path) -> dict[str, Tensor]:
    """`wanted` without its history of gradients; raises LabError where a name, a shape or a kind of number is not what was saved."""
    for name, tensor in wanted.items():
        entry = saved.get(name)
        if entry is None:
            raise LabError(f"{path}: this checkpoint does not hold {name}, which this run has: give another folder or delete it.")
        there, here = (f"{list(entry.size)} {entry.properties.dtype}", f"{list(tensor.shape)} {tensor.dtype}")
        if there != here:
            raise LabError(f"{path}: this checkpoint holds {name} as {there}, this run has {here}: give another folder or delete it.")
    return {name: tensor.detach() for name, tensor in wanted.items()}


def _silence() -> None:
    """torch warns at each save and load of a process that is alone. The filter stays: one that comes and goes is not safe with threads."""
    if not (dist.is_available() and dist.is_initialized()):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
