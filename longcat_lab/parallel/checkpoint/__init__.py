"""Checkpoints of one process or many by torch.distributed.checkpoint: whole or not there, checked when read, for any layout."""

from longcat_lab.parallel.checkpoint.checkpoints import Checkpoints, Restored
from longcat_lab.parallel.checkpoint.tensors import empty_optimizer_tensors, load_optimizer_tensors, model_tensors, optimizer_tensors

__all__ = ["Checkpoints", "Restored", "empty_optimizer_tensors", "load_optimizer_tensors", "model_tensors", "optimizer_tensors"]
