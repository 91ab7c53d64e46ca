"""What nodes with an engine share: its thread, its settings, and the ways of chunks between pool and store."""
