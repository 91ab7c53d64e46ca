"""What a run found, for people and for programs."""

from spolia_fidelity.report.folder import write_report
from spolia_fidelity.report.json_line import json_line
from spolia_fidelity.report.table import print_result

__all__ = ["json_line", "print_result", "write_report"]
