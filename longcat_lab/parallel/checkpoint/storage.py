"""Where torch.distributed.checkpoint writes and reads: safetensors files and a manifest in a folder that is renamed into place.

torch's own file writer keeps a pickle in the folder and takes no last step that others could see as one; its safetensors writer holds
a second copy of everything in memory, and knows a shape only from the pieces that are there. Plans, pieces and resharding are torch's.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch.distributed.checkpoint import Metadata, StorageReader, StorageWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from longcat_lab.errors import LabError
from longcat_lab.files import save_tensors
from longcat_lab.parallel.checkpoint.manifest import MANIFEST, Manifest, piece_name, proof, sync


class Planner(DefaultSavePlanner):
    """torch's, which keeps one of several equal pieces, for tensors by name; pieces that cannot be equal are refused, not dropped."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        first: dict[Any, Any] = {}
        for item in (item for plan in all_plans for item in plan.items):
            other = first.setdefault(item.index, item)
            if (other.type, other.tensor_data) != (item.type, item.tensor_data):
                raise LabError(f"{item.index.fqn} cannot be saved: two processes hold different tensors by this name, make it a DTensor.")
        return super().create_global_plan(all_plans)


class Writer(StorageWriter):
    """Writes `.NAME.tmp` beside `path`; once all have written, the first process renames it to `path` and calls `after`.

    Args:
        path: folder that does not exist, or that is to be replaced; the one that stands there goes in the last moment.
        manifest: complete but for files and tensors.
    """

    def __init__(self, path: Path, manifest: Manifest, after: Callable[[], None]) -> None:
        self.path, self.manifest, self.after = path, manifest, after
        self.temporary = path.with_name(f".{path.name}.tmp")

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing: a writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        if is_coordinator:  # all others begin to write after this
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=f"part-{rank:05d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors, written, seen = {}, [], set()
        for item in plan.items:
            chunk, shape = item.tensor_data.chunk, item.tensor_data.size
            if chunk.sizes.numel() == 0:
                continue
            tensor = planner.resolve_data(item).detach().contiguous().cpu()
            memory = tensor.untyped_storage().data_ptr()
            tensors[piece_name(item.index.fqn, chunk.offsets, chunk.sizes, shape)] = tensor.clone() if memory in seen else tensor
            seen.add(memory)
            written.append((item.index, tensor.nbytes))
        results: list[WriteResult] = []
        if tensors:
            file = plan.storage_data
            self.temporary.mkdir(parents=True, exist_ok=True)  # another machine may not see yet that it is there
            save_tensors(tensors, self.temporary / file)
            sync(self.temporary / file)
            place = (file, proof(self.temporary / file))
            results = [WriteResult(index, size, place) for index, size in written]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: result.storage_data for part in results for result in part}
        by_chunk = {(index.fqn, index.offset): file for index, (file, _) in places.items()}
        tensors = {
            name: {
                "dtype": str(entry.properties.dtype).removeprefix("torch."),
                "shape": list(entry.size),
                "pieces": [
                    [by_chunk[name, chunk.offsets], list(chunk.offsets), list(chunk.sizes)] for chunk in entry.chunks if chunk.sizes.numel()
                ],
            }
            for name, entry in metadata.state_dict_metadata.items()
        }
        manifest = dataclasses.replace(self.manifest, files=dict(places.values()), tensors=tensors)
        (self.temporary / MANIFEST).write_text(manifest.text(), encoding="utf-8")
        sync(self.temporary / MANIFEST)
        sync(self.temporary)
        if self.path.exists():
            remove(self.path)
        os.replace(self.temporary, self.path)
        sync(self.path.parent)
        self.after()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class Reader(StorageReader):
    """Reads of a checkpoint's files only what a plan asks for."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        self.path, self.metadata = path, metadata

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing: a reader reads one checkpoint."""

    def read_metadata(self) -> Metadata:
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Nothing."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            file, key, sizes = self.metadata.storage_data[item.storage_index]
            by_file.setdefault(file, []).append((item, key, sizes))
        for file, items in by_file.items():
            with safe_open(self.path / file, framework="pt") as handle:
                for item, key, sizes in items:
                    target = planner.resolve_tensor(item).detach()
                    whole = item.lengths == sizes
                    place = tuple(slice(first, first + size) for first, size in zip(item.storage_offsets, item.lengths, strict=True))
                    target.copy_(handle.get_tensor(key) if whole else handle.get_slice(key)[place])
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def remove(path: Path) -> None:
    """Takes a checkpoint away in one step, then frees its space; what a kill leaves of it is a leftover and not a damaged checkpoint."""
    gone = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)
