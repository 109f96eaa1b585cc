"""How tensors are stored: integers in few bits, zeros as a bit mask, exact halves in two bytes.

Nothing here changes a value: `unpack_state(pack_state(model))` equals `model.state_dict()`. Each
tensor is written in the smallest of these forms, which combine:

- a mask of one bit an element and the values that are not zero (pruning);
- float32 values that fp16 holds exactly as fp16;
- integers of a range of n: k digits of base n in a byte (five ternary, two int4), or bit-packed;
- on request, integers entropy-coded: the Huffman stage of deflate (Deep Compression, Han et al.
  2016, arXiv 1510.00149).

All bytes go into one tensor beside an index (JSON, deflated), since torch.save spends 300 bytes on
each tensor.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
PAYS = 0.97  # the state of a plain model is packed if that leaves at most this share of its bytes


def digits_per_byte(base: int) -> int:
    """How many digits of `base` (2..256) one byte holds."""
    return max(k for k in range(1, 9) if base**k <= 256)


def pack_digits(values: Tensor, base: int) -> Tensor:
    """Integers 0..base-1 of any shape to uint8 (n,): several a byte, the first one lowest."""
    k = digits_per_byte(base)
    flat = values.flatten().to(torch.uint8)
    flat = nn.functional.pad(flat, (0, -len(flat) % k)).view(-1, k)
    weights = torch.tensor([base**i for i in range(k)], dtype=torch.uint8)
    return (flat * weights).sum(1, dtype=torch.uint8)


def unpack_digits(packed: Tensor, base: int, count: int) -> Tensor:
    """The inverse of `pack_digits`: int64 (count,)."""
    return digits_of_bytes(base)[packed.to(torch.int32)].flatten()[:count]


def digits_of_bytes(base: int) -> Tensor:
    """The digits of every byte, the first one lowest: int64 (base**k, k)."""
    k = digits_per_byte(base)
    return torch.tensor([[byte // base**i % base for i in range(k)] for byte in range(base**k)])


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Integers 0..2**bits-1 (bits 1..8) of any shape to uint8 (n,), with no bit left between."""
    flat = values.flatten().to(torch.uint8).numpy()
    spread = np.unpackbits(flat[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(spread.ravel(), bitorder="little"))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 (count,)."""
    spread = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little")
    return torch.from_numpy(np.packbits(spread.reshape(-1, bits), axis=1, bitorder="little")[:, 0])


def encode(tensor: Tensor, entropy_coding: bool = False) -> tuple[dict[str, Any], Tensor]:
    """The smallest form of a tensor: how to read it, and its bytes as uint8 (n,)."""
    x = tensor.detach().cpu().contiguous()
    head: dict[str, Any] = {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}
    x = x.flatten()
    info, data = _encode_values(x, entropy_coding)
    present = x != 0
    survivors = int(present.sum())
    if survivors < len(x):
        sparse, values = _encode_values(x[present], entropy_coding)
        mask = pack_bits(present, 1)
        if len(mask) + len(values) < len(data):
            info, data = {**sparse, "survivors": survivors}, torch.cat((mask, values))
    return head | info, data


def _encode_values(x: Tensor, entropy_coding: bool) -> tuple[dict[str, Any], Tensor]:
    if x.dtype == torch.float32:
        half = x.to(torch.float16)
        if torch.equal(half.to(torch.float32).view(torch.int32), x.view(torch.int32)):
            return {"half": True}, half.view(torch.uint8)
    if x.dtype not in (torch.int8, torch.uint8) or not len(x):
        return {}, x.view(torch.uint8)
    low, high = int(x.min()), int(x.max())
    levels = max(high - low + 1, 2)
    digits = (x.to(torch.int16) - low).to(torch.uint8)
    bits = (levels - 1).bit_length()
    info: dict[str, Any] = {"low": low}
    if bits * digits_per_byte(levels) >= 8:
        info["base"], data = levels, pack_digits(digits, levels)
    else:
        info["bits"], data = bits, pack_bits(digits, bits)
    if entropy_coding:
        coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
        coded = coder.compress(digits.numpy().tobytes()) + coder.flush()
        if len(coded) < len(data):
            info = {"low": low, "deflate": True}
            data = torch.frombuffer(bytearray(coded), dtype=torch.uint8)
    return info, data


def decode(info: dict[str, Any], data: Tensor) -> Tensor:
    """The tensor that `encode` was given; raises ValueError for damaged bytes."""
    dtype = DTYPES[info["dtype"]]
    size = int(np.prod(info["shape"], dtype=np.int64))
    if "survivors" not in info:
        return _decode_values(info, data, size, dtype).view(info["shape"])
    mask_bytes = (size + 7) // 8
    values = _decode_values(info, data[mask_bytes:], info["survivors"], dtype)
    x = torch.zeros(size, dtype=dtype)
    x[unpack_bits(data[:mask_bytes], 1, size).bool()] = values
    return x.view(info["shape"])


def _decode_values(info: dict[str, Any], data: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    if "half" in info:
        return data.clone().view(torch.float16).to(dtype)
    if "low" not in info:
        return data.clone().view(dtype)
    if "deflate" in info:
        raw = _inflated(data, -zlib.MAX_WBITS)
        digits = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    elif "base" in info:
        digits = unpack_digits(data, info["base"], count)
    else:
        digits = unpack_bits(data, info["bits"], count)
    values: Tensor = digits.to(torch.int16) + info["low"]
    return values.to(dtype)


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a module itself, not of its children."""
    hidden = module._non_persistent_buffers_set
    state = dict(module.named_parameters(recurse=False))
    buffers = {k: b for k, b in module.named_buffers(recurse=False) if k not in hidden}
    return {k: v.detach() for k, v in {**state, **buffers}.items()}


def stored_bytes(state: dict[str, Tensor], entropy_coding: bool = False) -> int:
    """Bytes that tensors take in a file, without the index."""
    return sum(len(encode(tensor, entropy_coding)[1]) for tensor in state.values())


def pack_state(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint stores: `{"index", "bytes"}`, or the state dict itself for a plain model.

    A plain model has no layers of this package, and numbers that hardly pack. Integers of a module
    whose attribute `entropy_coding` is true are entropy-coded.
    """
    index: list[dict[str, Any]] = []
    pieces: list[Tensor] = []
    plain = 0
    replaced = False
    for prefix, module in model.named_modules():
        replaced |= type(module).__module__.startswith(f"{__package__}.")
        for key, tensor in own_state(module).items():
            info, data = encode(tensor, getattr(module, "entropy_coding", False))
            name = f"{prefix}.{key}" if prefix else key
            index.append({"name": name, **info, "bytes": len(data)})
            pieces.append(data)
            plain += tensor.numel() * tensor.element_size()
    total = sum(map(len, pieces))
    if not replaced and total > PAYS * plain:
        return model.state_dict()
    data = torch.empty(total, dtype=torch.uint8)
    end = total
    while pieces:  # each is freed once it is copied
        piece = pieces.pop()
        data[end - len(piece) : end] = piece
        end -= len(piece)
    text = zlib.compress(json.dumps(index).encode(), 9)
    return {"index": torch.frombuffer(bytearray(text), dtype=torch.uint8), "bytes": data}


def unpack_state(stored: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of what `pack_state` returned; raises ValueError for damaged bytes."""
    if stored.keys() != {"index", "bytes"}:
        return stored
    index = json.loads(_inflated(stored["index"], zlib.MAX_WBITS))
    state: dict[str, Tensor] = {}
    start = 0
    for info in index:
        end = start + info["bytes"]
        if end > len(stored["bytes"]):
            raise ValueError("packed tensors end early")
        state[info["name"]] = decode(info, stored["bytes"][start:end])
        start = end
    return state


def _inflated(data: Tensor, window: int) -> bytes:
    try:
        return zlib.decompress(data.numpy().tobytes(), window)
    except zlib.error as error:
        raise ValueError(f"damaged packed tensors: {error}") from None
