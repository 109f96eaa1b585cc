"""Weights become zero, or modules lose whole channels and heads.

`method` says which go and when; `saliency` chooses single weights by speech; `structured` knows
what can go as a whole, and `removal` what going would cost.
"""

from compress.pruning.method import Config, apply, parts, prepare, update, why_kept

__all__ = ["Config", "apply", "parts", "prepare", "update", "why_kept"]
