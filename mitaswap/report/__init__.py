"""Runs become a page: one self-contained HTML file, the same as Markdown, figures and rows.

Everything comes from the rows and the provenance of the runs; nothing here needs torch, so a report
can be rebuilt wherever the run directory is.
"""

from mitaswap.report._write import write_report

__all__ = ["write_report"]
