"""What a run found, for people and for programs."""

from spolia_fidelity.report.folder import check_folder, write_report
from spolia_fidelity.report.json_line import json_line
from spolia_fidelity.report.speech import speak_any_encoding
from spolia_fidelity.report.table import print_result

__all__ = ["check_folder", "json_line", "print_result", "speak_any_encoding", "write_report"]
