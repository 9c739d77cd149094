"""Helpers that several rooms' tests share."""

HANG_S = 300.0
"""Ends what hangs: nothing that works takes a fifth of it, on a machine however busy."""
