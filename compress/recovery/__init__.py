"""Training alone, to win back what earlier steps have lost: a step of recipes.

It takes the options of fine-tuning, a learning rate of its own among them.
"""

from compress.recovery.method import TUNING, Config, apply, why_kept

__all__ = ["TUNING", "Config", "apply", "why_kept"]
