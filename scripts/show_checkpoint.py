"""Shows what a checkpoint holds.

    python scripts/show_checkpoint.py model.pt

Config, data, history, the layers that compression put in, and bytes by component and storage.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from asr.network.checkpoint import load_checkpoint, read_checkpoint
from asr.runtime.cli import Parser, guarded
from compress import packing

GEOMETRY = {
    "in_features", "out_features", "bias", "in_channels", "out_channels", "kernel_size", "stride",
    "padding", "dilation", "groups",
}  # fmt: skip
Rows = list[tuple[str, ...]]


def storage(info: dict[str, Any]) -> str:
    """How `compress.packing` stores a tensor, from its entry in the index."""
    if "half" in info:
        kind = "fp16"
    elif "deflate" in info:
        kind = "Huffman"
    elif "base" in info:
        bits = 8 / packing.digits_per_byte(info["base"])
        kind = "ternary" if info["base"] == 3 else f"{bits:.2g}-bit"
    elif "bits" in info:
        kind = f"{info['bits']}-bit"
    else:
        kind = str(info.get("dtype", "packed"))
    return kind + " sparse" * ("survivors" in info)


def tensors(model: nn.Module, packed: bool) -> list[tuple[str, int, str]]:
    """(name, bytes in the file, storage) of every tensor of a checkpoint's model."""
    rows = []
    for prefix, module in model.named_modules():
        for key, tensor in packing.own_state(module).items():
            size, kind = tensor.nbytes, str(tensor.dtype).removeprefix("torch.")
            if packed:
                info, data = packing.encode(tensor, getattr(module, "entropy_coding", False))
                size, kind = data.nbytes, storage(info)
            rows.append((f"{prefix}.{key}" if prefix else key, size, kind))
    return rows


def component(name: str) -> str:
    """`blocks.3.ff1.up.weight` belongs to `blocks.*.ff1`, `head.bias` to `head`."""
    inside = re.match(r"blocks\.\d+\.(\w+)", name)
    return f"blocks.*.{inside[1]}" if inside else name.split(".")[0]


def size_rows(model: nn.Module, packed: bool) -> Rows:
    """Component, weights, bytes, share and kinds of storage; the last row sums up."""
    weights: Counter[str] = Counter()
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(x, nn.Parameter) or name.endswith(("qweight", "indices")):
            weights[component(name)] += x.numel()
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    for name, n_bytes, kind in tensors(model, packed):
        sizes[component(name)][kind] += n_bytes
    total = sum(sum(kinds.values()) for kinds in sizes.values())
    rows: Rows = [("component", "weights", "bytes", "share", "stored as")]
    for name in sorted(sizes, key=lambda n: -sum(sizes[n].values())):
        own = sum(sizes[name].values())
        shares = [(kind, n / max(own, 1)) for kind, n in sizes[name].most_common()]
        kinds = [f"{kind} {share:.0%}" for kind, share in shares if share >= 0.005]
        part = f"{own / max(total, 1):.1%}"
        rows.append((name, f"{weights[name]:,}", f"{own:,}", part, ", ".join(kinds)))
    return [*rows, ("all", f"{sum(weights.values()):,}", f"{total:,}", "100.0%", "")]


def layer_rows(layers: dict[str, dict[str, Any]]) -> Rows:
    """Kind, number and options of the layers that differ from a fresh model's; ranges if mixed."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in layers.values():
        groups[entry["layer"]].append(entry["args"])
    rows: Rows = [("layer", "count", "options")]
    for kind, args in sorted(groups.items()):
        options = []
        for key in sorted({key for one in args for key in one} - GEOMETRY):
            values = sorted({str(one.get(key)) for one in args}, key=lambda v: (len(v), v))
            options.append(f"{key} {values[0]}" + (f"..{values[-1]}" if len(values) > 1 else ""))
        rows.append((kind, str(len(args)), ", ".join(options) or "-"))
    return rows


def table(rows: Rows) -> str:
    """Columns of equal width; numbers to the right, the first and the last column to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors inside nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    inner = value.values() if isinstance(value, dict) else value
    return sum(map(tensor_bytes, inner)) if isinstance(value, dict | list | tuple) else 0


def listing(name: str, values: dict[str, Any]) -> str:
    """A name and its `key value` pairs, wrapped; empty values are left out."""
    pairs = (
        f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
        if value not in ([], "", {})
    )
    indent = " " * max(10, len(name))
    return textwrap.fill(
        ", ".join(pairs) or "-", 100, initial_indent=name.ljust(10), subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def describe(path: str) -> str:
    """The whole printed text; CheckpointError for a file that is none."""
    model = load_checkpoint(path).model  # checks that everything fits together
    contents = read_checkpoint(path)
    size = Path(path).stat().st_size
    rows = size_rows(model, packed=contents["model"].keys() == {"index", "bytes"})
    state = tensor_bytes(contents.get("training"))
    rest = size - state - int(rows[-1][2].replace(",", ""))
    tokens = contents["tokens"]
    kind = "characters" if contents["sentencepiece_model"] is None else "BPE pieces"
    lines = [
        f"{path}: {size:,} bytes, format {contents['version']}",
        listing("model", contents["config"]["model"]),
        listing("features", contents["config"]["features"]),
        f"tokens    {len(tokens)} {kind}: {' '.join(tokens[:40])}{' ...' * (len(tokens) > 40)}",
        listing("data", contents["data"]),
        "history" + "   -" * (not contents["history"]),
    ]
    for number, entry in enumerate(contents["history"], 1):
        more = {k: v for k, v in entry.items() if k not in ("step", "config")}
        title = f"  {number}. {entry.get('step')}"
        lines.append(listing(f"{title}: ", more) if more else title)
        lines.append(listing("", entry.get("config", {})))
    if contents["layers"]:
        lines += ["layers put in by compression", table(layer_rows(contents["layers"]))]
    lines += ["sizes", table(rows)]
    lines.append(f"  beside the weights: {rest:,} bytes of config, tokens, index and zip headers")
    if "training" in contents:
        lines.append(f"  resume state: {state:,} bytes")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("model_path", help="a checkpoint (.pt)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    print(describe(args.model_path))
    return 0


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
