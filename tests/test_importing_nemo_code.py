"""Imports against NeMo's own network code, where an unpacked wheel of it lies in $NEMO_WHEEL."""

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from asr.importing.nemo import import_nemo
from tests.test_importing import write_tar

WHEEL = os.environ.get("NEMO_WHEEL", "")
pytestmark = pytest.mark.skipif(not WHEEL, reason="see experiments/importing/nemo_wheel.py")

SIZES = {
    "4x": dict(d_model=24, n_heads=4, subsampling="striding", conv_kernel_size=31),
    "8x": dict(d_model=32, n_heads=2, subsampling="dw_striding", subsampling_factor=8,
               subsampling_conv_channels=12, conv_kernel_size=9, n_layers=3),
    "8x striding, 128 mels, unscaled": dict(
        d_model=16, n_heads=2, subsampling="striding", subsampling_factor=8, feat_in=128,
        xscaling=False, conv_kernel_size=15),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_nemos_network_is_met(tmp_path: Path, name: str):
    from experiments.importing.nemo_wheel import ConformerCTC

    torch.manual_seed(0)
    settings: dict[str, Any] = {"feat_in": 80, "n_layers": 2, **SIZES[name]}
    theirs = ConformerCTC(WHEEL, 28, **settings).eval()
    for x in [*theirs.parameters(), *theirs.buffers()]:
        if x.is_floating_point() and x.ndim < 3 and min(x.shape, default=0) < 40:
            torch.nn.init.uniform_(x, 0.1, 0.9)
    labels = [" ", *"abcdefghijklmnopqrstuvwxyz'"]
    config = {
        "target": "nemo.EncDecCTCModel", "nemo_version": "3.0.0", "labels": labels,
        "preprocessor": {"features": settings["feat_in"], "window_size": 0.025},
        "encoder": settings, "decoder": {"vocabulary": list(labels), "num_classes": 28},
    }  # fmt: skip
    buffer = io.BytesIO()
    state = theirs.state_dict()
    torch.save({k: v for k, v in state.items() if "pos_enc" not in k}, buffer)
    files = {"model_config.yaml": yaml.safe_dump(config).encode(),
             "model_weights.ckpt": buffer.getvalue()}  # fmt: skip
    ours = import_nemo(write_tar(tmp_path / "a.nemo", files)).checkpoint.model
    features = torch.randn(1, 203, settings["feat_in"])
    with torch.inference_mode():
        expected = theirs(features.transpose(1, 2), torch.tensor([203]))
        found = ours(features).log_probs
    difference = (found - expected[..., [28, *range(1, 28), 0]]).abs().max()
    print(f"{name}: {difference:.1e}")
    assert difference < 1e-5
