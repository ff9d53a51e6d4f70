"""What notebooks import: figures in one style, tables, and the parts of the result page. Names load on first use: scipy is not loaded
for a curve."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longcat_lab.notebook.drafted import after_real_text, drafting_table, prompts, with_steps
    from longcat_lab.notebook.figures import architecture_costs, curves, differences
    from longcat_lab.notebook.figures_attention import (
        attention_likeness,
        fixed_share,
        index_divergence,
        likeness_by_distance,
        position_losses,
        probe_accuracy,
        selection_maps,
    )
    from longcat_lab.notebook.figures_moe import activated_range, class_experts, expert_load, held_budget, mixture_measures
    from longcat_lab.notebook.figures_mtp import drafting, step_losses, step_quality
    from longcat_lab.notebook.figures_ngram import collision_lattice, collision_spikes, hit_rate, joint_uniqueness, table_load
    from longcat_lab.notebook.figures_rows import once_hit_displacements, row_norm_by_frequency, row_use
    from longcat_lab.notebook.ngram_report import (
        collision_sweep,
        corpus_stream,
        displacement_table,
        joint_sweep,
        row_counts,
        slope_by_seed,
        starting_scale,
        table_rows,
        training_stream,
    )
    from longcat_lab.notebook.page import Page
    from longcat_lab.notebook.routing import experts_by_class
    from longcat_lab.notebook.style import show

_HOME = {
    "drafted": ("after_real_text", "drafting_table", "prompts", "with_steps"),
    "figures": ("architecture_costs", "curves", "differences"),
    "figures_attention": (
        "attention_likeness",
        "fixed_share",
        "index_divergence",
        "likeness_by_distance",
        "position_losses",
        "probe_accuracy",
        "selection_maps",
    ),
    "figures_moe": ("activated_range", "class_experts", "expert_load", "held_budget", "mixture_measures"),
    "figures_mtp": ("drafting", "step_losses", "step_quality"),
    "figures_ngram": ("collision_lattice", "collision_spikes", "hit_rate", "joint_uniqueness", "table_load"),
    "figures_rows": ("once_hit_displacements", "row_norm_by_frequency", "row_use"),
    "ngram_report": (
        "collision_sweep",
        "corpus_stream",
        "displacement_table",
        "joint_sweep",
        "row_counts",
        "slope_by_seed",
        "starting_scale",
        "table_rows",
        "training_stream",
    ),
    "page": ("Page",),
    "routing": ("experts_by_class",),
    "style": ("show",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Page",
    "activated_range",
    "after_real_text",
    "architecture_costs",
    "attention_likeness",
    "class_experts",
    "collision_lattice",
    "collision_spikes",
    "collision_sweep",
    "corpus_stream",
    "curves",
    "differences",
    "displacement_table",
    "drafting",
    "drafting_table",
    "expert_load",
    "experts_by_class",
    "fixed_share",
    "held_budget",
    "hit_rate",
    "index_divergence",
    "joint_sweep",
    "joint_uniqueness",
    "likeness_by_distance",
    "mixture_measures",
    "once_hit_displacements",
    "position_losses",
    "probe_accuracy",
    "prompts",
    "row_counts",
    "row_norm_by_frequency",
    "row_use",
    "selection_maps",
    "show",
    "slope_by_seed",
    "starting_scale",
    "step_losses",
    "step_quality",
    "table_load",
    "table_rows",
    "training_stream",
    "with_steps",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE})
