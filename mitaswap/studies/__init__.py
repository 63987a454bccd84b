"""Experiments, one file each: a study turns what was asked into cells, and a cell into rows."""

from mitaswap.studies._base import STUDIES, Cell, Plan, Study, cells_of, open_run, run_cells
from mitaswap.studies._workbench import Workbench

__all__ = ["STUDIES", "Cell", "Plan", "Study", "Workbench", "cells_of", "open_run", "run_cells"]
