"""From the user's files of prompts and existing answers to records."""
