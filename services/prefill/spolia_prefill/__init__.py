"""The prefill node: compiles local chunks and prefills exact contexts for decode nodes."""
