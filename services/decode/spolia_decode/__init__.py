"""The decode node: owns a request until its last token.

Read in this order: `server` (a request's life), `exact` and `linked` (where its context comes from), `batch` (how it
decodes).
"""
