"""Preference rows for others to use: files, and a dataset card."""
