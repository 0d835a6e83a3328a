"""Text that users write: addresses, YAML and JSON, UTF-8 files."""
