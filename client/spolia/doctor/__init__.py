"""Checks of a running cluster from where its clients are: what `spolia doctor` does."""
