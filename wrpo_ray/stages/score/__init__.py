"""A reward for every answer."""
