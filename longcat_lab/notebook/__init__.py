"""What notebooks import: figures in one style, tables, and the parts of the result page."""

from longcat_lab.notebook.figures import architecture_costs, curves, differences
from longcat_lab.notebook.page import Page
from longcat_lab.notebook.style import show

__all__ = ["Page", "architecture_costs", "curves", "differences", "show"]
