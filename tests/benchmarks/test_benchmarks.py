"""The benchmarks run, and their peers compute what ours compute; no time is ever asserted."""

import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def test_the_peer_computes_the_same():
    from benchmarks.suite import _padded_bmm
    from longcat_lab.blocks.moe.experts_op import experts_reference
    from longcat_lab.blocks.moe.router_op import route_reference

    u = torch.randn(64, 16)
    slots, weights, _ = route_reference(u, torch.randn(8, 16), torch.zeros(8), 3, 2.0)
    gate_up, down = torch.randn(5, 16, 16), torch.randn(5, 16, 8)
    expected = experts_reference(u, slots, weights, gate_up, down)
    torch.testing.assert_close(_padded_bmm(u, slots, weights, gate_up, down), expected, rtol=1e-4, atol=1e-4)


def test_the_command_writes_rows(tmp_path):
    out = tmp_path / "rows.json"
    done = subprocess.run([sys.executable, "-m", "benchmarks", "zero_experts", "--json", out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())
    assert row["name"] == "zero_experts" and row["lowest"] <= row["ratio"] <= row["highest"]
    bad = subprocess.run([sys.executable, "-m", "benchmarks", "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2 and "no benchmark 'nothing'" in bad.stderr
