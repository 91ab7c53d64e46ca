"""The front door: tokenizes, derives ids, picks nodes, streams answers back. Stateless, and without torch.

The life of a request reads `server` → `request` → `catalog` → `routing` → `generation`.
"""
