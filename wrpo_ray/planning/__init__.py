"""Estimates before a run: work, tokens, GPU-hours, money and time."""
