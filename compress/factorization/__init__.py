"""Weights as products of two smaller ones.

`method` chooses them and their ranks.
"""

from compress.factorization.method import Config, LowRankLinear, apply

__all__ = ["Config", "LowRankLinear", "apply"]
