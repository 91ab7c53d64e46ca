"""`spolia bench reuse`: what does reuse save, and how far is it from what this machine can do?

One noun per file: `options`, `system` (the cluster), `prompts`, `ways` (a row of the table and the check that it is
what it says), `residency` (where chunks are put before a row), `floor`, `operators`, `rates` and `machine` (what the
hardware allows). `ttft`, `loop` and `demo` measure; `transformers_prefill` is the baseline of `ttft`'s rounds.
"""
