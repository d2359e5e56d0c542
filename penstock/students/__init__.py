"""A teacher and its students side by side: what each knows and what it costs.

report = compare("runs/teacher", ["small=runs/a,runs/b", "runs/c"], Manifest.load("data/val"))
print_report(report); draw(report, Path("students.png")); as_json(report)
"""

from penstock.students._networks import Entry, entry
from penstock.students._picture import draw
from penstock.students._report import Gain, Report, Row, as_json
from penstock.students._text import markdown, print_report, table
from penstock.students._work import compare

__all__ = ["Entry", "Gain", "Report", "Row", "as_json", "compare", "draw", "entry", "markdown", "print_report", "table"]
