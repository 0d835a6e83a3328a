"""Rows and where they lie: Arrow schemas, buckets, shards, and the outline of a run."""
