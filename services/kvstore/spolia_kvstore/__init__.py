"""The kvstore process: chunk objects in memory, claims, pins, and the directory of who is in the cluster. No torch."""
