"""Distillation: a smaller student learns to say what its teacher says.

`student` makes it from the teacher, `teacher` asks one or several, `cache` keeps their answers,
`training` is the loss and the run.
"""

from compress.distillation.method import TUNING, WITHOUT, Config, apply, check, train, why_kept

__all__ = ["TUNING", "WITHOUT", "Config", "apply", "check", "train", "why_kept"]
