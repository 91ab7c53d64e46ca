"""OpenAI-compatible HTTP over the same gateway that gRPC serves."""
