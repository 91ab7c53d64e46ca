"""`spolia cache`: what operators see and do in KV stores. A file for each command, and what several of them share."""
