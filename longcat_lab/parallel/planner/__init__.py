"""How a model would lie on many cards, by arithmetic: memory, bytes on the wire, bubbles, time of a step. Needs no card and no process."""

from longcat_lab.parallel.planner.activations import ACCELERATOR, CPU, Keeping
from longcat_lab.parallel.planner.estimate import Estimate, estimate
from longcat_lab.parallel.planner.exact import Travelled, by_kind, by_purpose, even, predict_marks, predict_memory, predict_step
from longcat_lab.parallel.planner.hardware import Assumptions, Card, Network, assumptions, card, network
from longcat_lab.parallel.planner.links import Fabric
from longcat_lab.parallel.planner.place import Sent
from longcat_lab.parallel.planner.report import plain, told
from longcat_lab.parallel.planner.search import Plan, plan, settings
from longcat_lab.parallel.planner.setup import Model, Setup, check_setup, read_setup, take_apart

__all__ = [
    "ACCELERATOR",
    "CPU",
    "Assumptions",
    "Card",
    "Estimate",
    "Fabric",
    "Keeping",
    "Model",
    "Network",
    "Plan",
    "Sent",
    "Setup",
    "Travelled",
    "assumptions",
    "by_kind",
    "by_purpose",
    "card",
    "check_setup",
    "estimate",
    "even",
    "network",
    "plain",
    "plan",
    "predict_marks",
    "predict_memory",
    "predict_step",
    "read_setup",
    "settings",
    "take_apart",
    "told",
]
