"""An import against transformers' Parakeet, code that is neither NeMo's nor ours.

    pip install transformers
    python experiments/importing/check_transformers.py --output_path R.json

transformers draws a random model; its weights under NeMo's names make an archive, which is
imported. The exit code is 1 if a log-probability differs by more than 1e-4.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import yaml
from torch import Tensor, nn

from asr.common.provenance import command_line
from asr.importing.nemo import import_nemo
from asr.measure.machine import provenance
from asr.runtime.cli import Parser, guarded
from asr.runtime.files import check_writable, write_json

TOLERANCE = 1e-4  # of log-probabilities
SEED = 0
TOKENS, FRAMES = 40, 203
ENCODER: dict[str, Any] = {  # NeMo's names
    "feat_in": 80, "n_layers": 3, "d_model": 32, "n_heads": 4, "conv_kernel_size": 9,
    "subsampling": "dw_striding", "subsampling_factor": 8, "subsampling_conv_channels": 12,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "with biases, scaled": {"use_bias": True, "xscaling": True},
    "without biases, unscaled": {"use_bias": False, "xscaling": False},
    "128 mels": {"use_bias": True, "xscaling": True, "feat_in": 128},
}
NAMES = {  # theirs: NeMo's
    "encoder.subsampling.layers.": "encoder.pre_encode.conv.",
    "encoder.subsampling.linear.": "encoder.pre_encode.out.",
    ".conv.norm.": ".conv.batch_norm.", "ctc_head.": "decoder.decoder_layers.0.",
    ".relative_k_proj.": ".linear_pos.", ".q_proj.": ".linear_q.", ".k_proj.": ".linear_k.",
    ".v_proj.": ".linear_v.", ".o_proj.": ".linear_out.", ".bias_u": ".pos_bias_u",
    ".bias_v": ".pos_bias_v",
}  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command."""
    parser = Parser(__doc__)
    parser.add_argument("--output_path", required=True, help="JSON to write")
    args = parser.parse_args(argv)
    args.command = command_line("experiments/importing/check_transformers.py", argv)
    return args


def parakeet(encoder: dict[str, Any]) -> nn.Module:
    """transformers' model of these sizes, its weights and statistics at random."""
    from transformers import ParakeetCTCConfig, ParakeetEncoderConfig, ParakeetForCTC

    bias = encoder["use_bias"]
    config = ParakeetEncoderConfig(
        hidden_size=encoder["d_model"], num_hidden_layers=encoder["n_layers"],
        num_attention_heads=encoder["n_heads"], intermediate_size=4 * encoder["d_model"],
        conv_kernel_size=encoder["conv_kernel_size"], num_mel_bins=encoder["feat_in"],
        subsampling_factor=encoder["subsampling_factor"],
        subsampling_conv_channels=encoder["subsampling_conv_channels"],
        attention_bias=bias, convolution_bias=bias, scale_input=encoder["xscaling"], layerdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(SEED)
    model: nn.Module = ParakeetForCTC(
        ParakeetCTCConfig(
            vocab_size=TOKENS + 1, pad_token_id=TOKENS, encoder_config=config.to_dict()
        )
    ).eval()
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if x.is_floating_point() and "encode_positions" not in name:
            if x.ndim == 1:
                nn.init.uniform_(x, 0.5, 1.5)
            elif x.ndim == 2:
                nn.init.normal_(x, std=0.3)
    return model


def nemo_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of theirs under NeMo's names."""
    renamed = {}
    for name, x in state.items():
        for theirs, nemo in NAMES.items():
            name = name.replace(theirs, nemo)
        if "encode_positions" not in name:
            renamed[name] = x
    return renamed


def write_archive(path: Path, state: dict[str, Tensor], encoder: dict[str, Any]) -> None:
    """A .nemo file of characters."""
    labels = [chr(0x4E00 + i) for i in range(TOKENS)]
    about = {
        "target": "nemo.EncDecCTCModel", "nemo_version": "3.0.0", "labels": labels,
        "preprocessor": {"features": encoder["feat_in"], "window_size": 0.025},
        "encoder": encoder, "decoder": {"vocabulary": list(labels), "num_classes": TOKENS},
    }  # fmt: skip
    weights = io.BytesIO()
    torch.save(state, weights)
    files = {"model_config.yaml": yaml.safe_dump(about).encode(),
             "model_weights.ckpt": weights.getvalue()}  # fmt: skip
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def compare(folder: Path, case: str) -> dict[str, Any]:
    """The largest difference of log-probabilities between their model and its import."""
    encoder = ENCODER | CASES[case]
    theirs, path = parakeet(encoder), folder / "model.nemo"
    write_archive(path, nemo_names(theirs.state_dict()), encoder)
    ours = import_nemo(path).checkpoint.model
    features = torch.randn(1, FRAMES, encoder["feat_in"])
    with torch.inference_mode():
        expected = theirs(features, torch.ones(1, FRAMES, dtype=torch.long)).logits.log_softmax(-1)
        found = ours(features).log_probs
    expected = expected[..., [TOKENS, *range(1, TOKENS), 0]]
    if found.shape != expected.shape:
        raise ValueError(f"{case}: they give {expected.shape}, the import {found.shape}")
    return {
        "model": case, "steps": found.shape[1], "spread": float(expected.std()),
        "log_probs": float((found - expected).abs().max()),
    }  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Compares, prints and writes."""
    check_writable(args.output_path)
    with tempfile.TemporaryDirectory() as name:
        rows = [compare(Path(name), case) for case in CASES]
    about = provenance(args.command, SEED) | {"transformers": version("transformers")}
    for row in rows:
        print(f"{row['model']}: log-probabilities {row['log_probs']:.1e}")
    write_json(args.output_path, about | {"rows": rows})
    return int(any(row["log_probs"] > TOLERANCE for row in rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
