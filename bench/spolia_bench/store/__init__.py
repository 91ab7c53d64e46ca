"""`spolia bench store`: what finding, keeping and reading chunk objects costs, and what survives when processes die."""
