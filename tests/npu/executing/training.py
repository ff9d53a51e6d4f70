"""A process of a run on the executing `npu`: `python -m torch.distributed.run ... training.py WORK`, WORK a JSON file beside `settings`.

WORK: {"folder": ..., "runs": {name: [overrides]}}. Trains each run in `folder/name`, and stops and goes on once, so that a checkpoint
on the device is written and read. Leaves what it saw in `folder/seen-RANK.json`.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import longcat_lab as lab
from tests.npu import executing


def main():
    compiled = executing.activate()
    work = json.loads(Path(sys.argv[1]).read_text())
    folder, seen = Path(work["folder"]), {}
    for name, overrides in work["runs"].items():
        config = lab.load("tiny", *overrides)
        before = compiled.collective_calls()
        stopped = lab.fit(config, folder / name, progress=False, stop=lambda: True)
        run = lab.fit(config, folder / name, progress=False)
        seen[name] = {
            "first": stopped.summary["status"],
            "then": run.summary["status"],
            "collectives": compiled.collective_calls() - before,
        }
    rank = dist.get_rank() if dist.is_initialized() else 0
    seen["device"] = torch.accelerator.current_device_index()
    seen["bytes"] = torch.accelerator.max_memory_allocated()
    if dist.is_initialized():
        group = dist.group.WORLD
        seen["backends"] = [group._get_backend(torch.device(each)).name() for each in ("cpu", "npu")]
        dist.destroy_process_group()
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
