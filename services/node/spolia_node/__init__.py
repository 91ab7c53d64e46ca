"""What every service of Spolia shares: configuration, deadlines, errors over gRPC, health, drain, logs, metrics,
channels, membership and the client of the store.

No torch. Modules are imported by name, so a service loads what it uses.
"""
