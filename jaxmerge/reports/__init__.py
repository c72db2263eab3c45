"""Reports of merges and comparisons: records first, and HTML, Markdown and JSON made from them."""

from jaxmerge.reports.record import Report, Source, report
from jaxmerge.reports.writing import FORMS, check_target

__all__ = ["FORMS", "Report", "Source", "check_target", "report"]
