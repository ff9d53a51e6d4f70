"""Blocks assembled from a configuration."""

from longcat_lab.model.generate import generate
from longcat_lab.model.initialise import initialise
from longcat_lab.model.lm import LongcatLM, build

__all__ = ["LongcatLM", "build", "generate", "initialise"]
