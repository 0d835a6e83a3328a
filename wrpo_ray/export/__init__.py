"""Exports of a finished run: preference rows, the fused model, and rows read in Python."""
