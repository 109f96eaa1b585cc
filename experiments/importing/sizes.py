"""Sizes of public models from their shapes alone: python experiments/importing/sizes.py

Megabytes of the weights as float32; with matrices in int8 (a scale a row) or int4 (a scale every 64
numbers) and all else in float32. No weights are needed and none were downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from asr.network.model import ConformerCTC
from asr.runtime.config import ModelConfig

FAST = dict(
    conv_kernel_size=9, subsampling="dw_striding", subsampling_factor=8, subsampling_channels=256
)
MODELS: dict[str, dict[str, object]] = {
    "stt_en_conformer_ctc_small": dict(vocab_size=1025),
    "stt_en_conformer_ctc_medium": dict(
        vocab_size=1025, d_model=256, n_layers=18, subsampling_channels=256
    ),
    "stt_en_conformer_ctc_large": dict(
        vocab_size=129, d_model=512, n_layers=18, n_heads=8, subsampling_channels=512
    ),
    "stt_en_fastconformer_ctc_large": dict(
        vocab_size=1025, d_model=512, n_layers=18, n_heads=8, **FAST
    ),
    "parakeet-tdt_ctc-110m": dict(vocab_size=1025, d_model=512, n_layers=17, n_heads=8, **FAST),
    "parakeet-ctc-0.6b": dict(vocab_size=1025, d_model=1024, n_layers=24, n_heads=8, **FAST),
    "parakeet-ctc-1.1b": dict(vocab_size=1025, d_model=1024, n_layers=42, n_heads=8, **FAST),
}


def sizes(settings: dict[str, object]) -> tuple[int, int, int, int]:
    """Parameters, and bytes as float32, int8 and int4."""
    with torch.device("meta"):
        model = ConformerCTC(ModelConfig(**settings))  # type: ignore[arg-type]
    total = sum(p.numel() for p in model.parameters())
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    inside = sum(m.weight.numel() for m in linears)
    rows = sum(m.out_features for m in linears)
    groups = sum(m.out_features * -(-m.in_features // 64) for m in linears)
    rest = 4 * (total - inside)
    return total, 4 * total, rest + inside + 4 * rows, rest + inside // 2 + 2 * groups


if __name__ == "__main__":
    print("| model | parameters | float32 | int8 | int4 |\n|---|---|---|---|---|")
    for name, settings in MODELS.items():
        count, *rest = sizes(settings)
        print(f"| {name} | {count / 1e6:.1f} M | {' | '.join(f'{b / 1e6:.0f} MB' for b in rest)} |")
