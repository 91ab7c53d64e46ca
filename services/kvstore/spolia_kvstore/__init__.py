"""The kvstore process: chunk objects in memory and on disk, claims, pins, and who is in the cluster. No torch."""
