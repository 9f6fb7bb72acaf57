"""Runs and erasures -> one page for a browser: ``python -m memloc_lens.report RUN... -o report.html``."""

from memloc_lens.report.command import ReportSettings, write_report

__all__ = ["ReportSettings", "write_report"]
