"""`spolia bench shared`: decode steps that share what their sequences read, against those that do not."""
