"""A sweep's result page: what it says (`content`), how it is made (`render`), and whether it still agrees with the folder (`check`)."""

from longcat_lab.ablation.report.check import check
from longcat_lab.ablation.report.render import render

__all__ = ["check", "render"]
