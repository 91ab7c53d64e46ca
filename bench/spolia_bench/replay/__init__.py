"""`spolia bench replay`: how close does exact prefix reuse come to a perfect cache on a recorded trace?

Traces are the user's own files; none is shipped. Their block ids are chained over the prefix: an id says "this block
behind all of these", so a trace says what exact prefix reuse could find and nothing about reuse at other positions.

`formats` reads, `scale` fits a trace to this machine, `tokens` makes prompts of it, `ideal` says what a cache that
never forgets would find, `play` asks.
"""
