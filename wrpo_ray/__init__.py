"""Weighted-Reward Preference Optimization (WRPO, arXiv 2412.03187) on Ray."""

__version__ = "0.1.0"
