"""Rows and their files: Arrow schemas, buckets, answers, failed rows, the outline of a run."""
