"""longcat_lab: a workbench for architecture ablations of LongCat-2.0-class language models.

import longcat_lab as lab

cfg = lab.load("nano", "model.embedding.ngram.order=3")
lab.budget(cfg)
run = lab.fit(cfg)
"""

import longcat_lab.started  # noqa: F401 (before all that takes time: see there)
from longcat_lab.blocks import Block, BlockConfig, Budget, kinds, register
from longcat_lab.blocks.sparse_attention.selection import Selection
from longcat_lab.budget import activated, budget
from longcat_lab.config import ConfigError, RunConfig, apply, load, presets
from longcat_lab.errors import LabError
from longcat_lab.model import LongcatLM, build, from_pretrained, generate, save_pretrained, speculate
from longcat_lab.training import Run, identity
from longcat_lab.workbench import fit, panel, rank_agreement, runs

__version__ = "0.1.0"

__all__ = [
    "Block",
    "BlockConfig",
    "Budget",
    "ConfigError",
    "LabError",
    "LongcatLM",
    "Run",
    "RunConfig",
    "Selection",
    "activated",
    "apply",
    "budget",
    "build",
    "fit",
    "from_pretrained",
    "generate",
    "identity",
    "kinds",
    "load",
    "panel",
    "presets",
    "rank_agreement",
    "register",
    "runs",
    "save_pretrained",
    "speculate",
]
