"""`python -m benchmarks [NAME…] [--json FILE]`: one thread, ours and peers in turn; prints ratios with their spread."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from benchmarks.suite import SUITE


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Side by side against peers; ratio below 1: ours takes less.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SUITE)}; all when left out")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in SUITE]
    if unknown:
        parser.error(f"no benchmark '{unknown[0]}'; there are {', '.join(SUITE)}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    print(f"{'name':28}{'ours':26}{'peer':26}{'ours':>9}{'peer':>9}     {'ratio':>7}   spread")
    for name in arguments.names or SUITE:
        for row in SUITE[name]():
            rows.append(row)
            spread = f"{row.lowest:.2f} to {row.highest:.2f} ({row.pairs} pairs)"
            values = f"{row.ours_value:9.2f}{row.peer_value:9.2f} {row.unit:4}"
            print(f"{row.name:28}{row.ours:26}{row.peer:26}{values}{row.ratio:7.2f}   {spread}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
