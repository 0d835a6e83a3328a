"""The fixtures of `harness`, which tests also import helpers from."""

from support.harness import demo

__all__ = ["demo"]
