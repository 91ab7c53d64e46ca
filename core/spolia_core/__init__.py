"""Domain types every part of Spolia shares: errors, ids, sampling, prompts, reuse reports, chunk objects.

No torch, no gRPC. Modules that need `blake3` or `xxhash` (ids, digests) are imported by name, so the SDK can use the
error tree with neither installed.
"""
