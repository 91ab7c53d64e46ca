"""Benchmarks: each asks one question, prints a table and ends with one JSON line."""
