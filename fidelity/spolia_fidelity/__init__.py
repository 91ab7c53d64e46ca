"""What reuse of KV costs in quality: cases, measures, intervals and reports. Imports engine and core, never services."""
