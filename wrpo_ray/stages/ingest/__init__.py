"""Prompts and existing answers, from the user's files into records."""
