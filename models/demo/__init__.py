"""A small Llama checkpoint of our own, and everything that made it."""
