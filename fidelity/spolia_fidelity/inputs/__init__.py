"""Files as cases: any text, and QA files in the layouts their data sets are published in."""

from spolia_fidelity.inputs.load import load_cases
from spolia_fidelity.inputs.options import InputOptions

__all__ = ["InputOptions", "load_cases"]
