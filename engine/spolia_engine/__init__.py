"""The engine: a transformers model driven over spans of KV. Knows tensors, runs and contexts; knows no network.

Read in this order: `run` (what KV is), `pool` (who owns it), `link_plan` (what a request recomputes), `attention`
(the one equation, per layer), `fork` (many continuations at once), `engine` (all of it together).
"""
