"""The loop and what it needs: optimizer, schedule, evaluation, checkpoints, trackers, provenance."""

from longcat_lab.training.evaluation import evaluate, evaluate_all
from longcat_lab.training.fit import fit
from longcat_lab.training.provenance import code_hash, identity
from longcat_lab.training.run import Run

__all__ = ["Run", "code_hash", "evaluate", "evaluate_all", "fit", "identity"]
