"""The command `wrpo`."""

from wrpo_ray.cli.entry import main

__all__ = ["main"]
