"""What reuse of KV costs in quality: cases, policies, measures, intervals, reports."""
