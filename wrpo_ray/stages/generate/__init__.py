"""Answers of each source and of the target: by vLLM in our actors, or by an endpoint."""
