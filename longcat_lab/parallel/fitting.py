"""Whether a model, whatever its blocks are, can lie over processes as a layout says: what the configuration alone does not tell."""

from __future__ import annotations

import torch

from longcat_lab.blocks.table import Table
from longcat_lab.config import RunConfig
from longcat_lab.errors import LabError
from longcat_lab.model import LongcatLM
from longcat_lab.parallel import context, stages, tensor
from longcat_lab.parallel.layout import Layout, make_layout


def check(model: LongcatLM, layout: Layout) -> None:
    """Raises LabError, one sentence, where it cannot. `model` may be on the meta device; it is whole."""
    if layout.context > 1:
        context.check(model)
    if layout.pipeline > 1:
        stages.check(model)
    if layout.tensor > 1:
        tensor.check(model, layout.tensor)
    if layout.embedding > 1 and not any(isinstance(module, Table) for module in model.modules()):
        raise LabError(f"parallel.embedding {layout.embedding}: this model has no n-gram tables that could be divided; set it to 1.")


def check_config(config: RunConfig, processes: int) -> None:
    """The same before anything starts, with everything that `make_layout` sees."""
    layout = make_layout(config, processes)
    if processes > 1:
        with torch.no_grad(), torch.device("meta"):
            check(LongcatLM(config.model), layout)
