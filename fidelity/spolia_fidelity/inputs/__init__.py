"""Files as cases: any text, and QA files in the layouts their data sets are published in."""

from spolia_fidelity.inputs.load import load_cases
from spolia_fidelity.inputs.naming import SourceName, source_names
from spolia_fidelity.inputs.options import InputOptions

__all__ = ["InputOptions", "SourceName", "load_cases", "source_names"]
