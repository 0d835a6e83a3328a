"""The chain of stages that a config asks for, and running it."""
