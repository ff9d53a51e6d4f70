"""Blocks assembled from a configuration."""

from longcat_lab.model.generate import generate
from longcat_lab.model.initialise import initialise
from longcat_lab.model.lm import LongcatLM, build
from longcat_lab.model.pretrained import from_pretrained, save_pretrained
from longcat_lab.model.speculative import Speculation, speculate

__all__ = ["LongcatLM", "Speculation", "build", "from_pretrained", "generate", "initialise", "save_pretrained", "speculate"]
