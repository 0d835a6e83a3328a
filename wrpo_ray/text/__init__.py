"""Parsing of what users write: addresses, YAML, JSON and UTF-8 files."""
