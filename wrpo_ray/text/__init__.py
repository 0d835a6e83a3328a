"""Parsing of what users write (addresses, YAML, JSON, UTF-8 files), and showing what files hold."""
