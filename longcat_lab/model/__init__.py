"""Blocks assembled from a configuration."""

from longcat_lab.model.generate import generate
from longcat_lab.model.initialise import initialise
from longcat_lab.model.lm import LongcatLM, build
from longcat_lab.model.speculative import Speculation, speculate

__all__ = ["LongcatLM", "Speculation", "build", "generate", "initialise", "speculate"]
