"""The phoneme recogniser inside the wheel `hama` 1.7.0 (Apache-2.0), a small Conformer-CTC.

Its four blocks are ours without positions: see `block_state`. Its spectrogram and stem are its own.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr.network.attention import frame_context
from asr.network.model import ConformerBlock
from asr.runtime.config import ModelConfig

BLOCKS, WIDTH = 4, 144
# nameless matrices of a block, by their order in the file: feed-forward, attention, feed-forward
MATRICES = ("ff1.up", "ff1.down", "attn.qkv", "attn.out", "ff2.up", "ff2.down")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The arrays of a .hama file, as float32; ValueError for a file that is none.

    8 bytes of magic, a count, then entries: name, 1 for halves, sizes, offset and bytes of the
    data, which begins at the next multiple of 16.
    """
    try:
        return _read_tensors(Path(path).read_bytes())
    except (struct.error, ValueError) as error:
        raise ValueError(f"{path}: not a .hama file, or cut short ({error})") from None


def _read_tensors(raw: bytes) -> dict[str, Tensor]:
    place, found = 12, []

    def take(form: str) -> tuple[int, ...]:
        nonlocal place
        values = struct.unpack_from("<" + form, raw, place)
        place += struct.calcsize("<" + form)
        return values

    for _ in range(struct.unpack_from("<I", raw, 8)[0]):
        (length,) = take("H")
        name = take(f"{length}s")[0].decode()  # type: ignore[attr-defined]
        half, rank = take("BB")
        shape = take(f"{rank}I")
        found.append((name, "<f2" if half else "<f4", shape, take("QQ")[0]))
    start = -(-place // 16) * 16
    return {
        name: torch.tensor(
            np.frombuffer(raw, kind, math.prod(shape), start + offset).astype("f4").reshape(shape)
        )
        for name, kind, shape, offset in found
    }


class Teacher(nn.Module):
    """Waveforms (B, N) to its last hidden layer (B, T, 144), 50 frames a second, and symbols."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.tensors = read_tensors(path)
        config = ModelConfig(d_model=WIDTH, n_layers=BLOCKS, dropout=0.0)
        self.blocks = nn.ModuleList(
            ConformerBlock(config, WIDTH, plain=True) for _ in range(BLOCKS)
        )
        for number, block in enumerate(self.blocks):
            block.load_state_dict(block_state(self.tensors, number), strict=False)
        self.eval().requires_grad_(False)

    def stem(self, waveforms: Tensor) -> Tensor:
        """What the first block is given, (B, T, 144)."""
        w = self.tensors
        x = F.pad(waveforms[:, None], (200, 200), mode="reflect")  # (B, 1, N + 400)
        real, imaginary = (
            F.conv1d(x, w[f"stft_{part}_kernel"], stride=160) for part in ("real", "imag")
        )
        mel = (real**2 + imaginary**2).transpose(1, 2) @ w["mel_fb"]  # (B, 2 T, 80)
        mel = (mel + 1e-6).log().transpose(1, 2)
        stem = w["onnx::Conv_801"], w["onnx::Conv_802"]
        return F.gelu(F.conv1d(mel, *stem, stride=2, padding=1)).transpose(1, 2)

    @torch.no_grad()
    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        y = self.stem(waveforms)
        lengths = (lengths // 160 + 2) // 2
        context = frame_context(y, lengths, True)
        for block in self.blocks:
            y = block(y, *context)
        return y, lengths

    def symbols(self, hidden: Tensor) -> Tensor:
        """Log-probabilities (B, T, 191) of the teacher's phonemes."""
        head = "acoustic_model.model.proj."
        weight, bias = self.tensors[head + "weight"][..., 0], self.tensors[head + "bias"]
        return F.log_softmax(F.linear(hidden, weight, bias), dim=2)


def block_state(tensors: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Our names and shapes for the teacher's block; its batch norms are folded already."""
    start = f"acoustic_model.model.blocks.{number}."
    own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    nameless = sorted(
        (k for k in tensors if k.startswith("onnx::MatMul_")), key=lambda k: int(k.split("_")[1])
    )
    size = len(MATRICES)
    chosen = [k for k in nameless if tensors[k].ndim == 2 and WIDTH in tensors[k].shape]
    own_names = chosen[size * number : size * (number + 1)]
    matrices = {ours: tensors[k] for ours, k in zip(MATRICES, own_names, strict=True)}
    state = {f"{part}.weight": matrices[part].T for part in MATRICES if part != "attn.qkv"}
    for ours, theirs in (("ff1", "ffn1"), ("ff2", "ffn2")):
        state |= {f"{ours}.norm.{x}": own[f"{theirs}.norm.{x}"] for x in ("weight", "bias")}
        state |= {f"{ours}.up.bias": own[f"{theirs}.fc1.bias"]}
        state |= {f"{ours}.down.bias": own[f"{theirs}.fc2.bias"]}
    for ours, theirs in (("attn.norm", "attn_norm"), ("conv.norm", "conv.norm"), ("norm", "norm")):
        state |= {f"{ours}.{x}": own[f"{theirs}.{x}"] for x in ("weight", "bias")}
    thirds = matrices["attn.qkv"].T.chunk(3), own["attn.in_proj_bias"].chunk(3)
    for name, weight, bias in zip(("query", "key", "value"), *thirds, strict=True):
        state |= {f"attn.{name}.weight": weight, f"attn.{name}.bias": bias}
    state["attn.out.bias"] = own["attn.out_proj.bias"]
    for ours, theirs in (("conv.up", "conv.pointwise1"), ("conv.down", "conv.pointwise2")):
        state |= {f"{ours}.weight": own[f"{theirs}.weight"][..., 0]}
        state |= {f"{ours}.bias": own[f"{theirs}.bias"]}
    depthwise = tensors[f"onnx::Conv_{804 + 3 * number}"]
    state["conv.depthwise.weight"] = depthwise.reshape(WIDTH, 1, -1)
    state["conv.depthwise.bias"] = tensors[f"onnx::Conv_{805 + 3 * number}"]
    return {k: v.clone() for k, v in state.items()}
