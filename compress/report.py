"""What compression did to a checkpoint: per layer, in all, and what stayed as large and why."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any, cast

import torch
from torch import nn

from asr.network.checkpoint import Checkpoint, checkpoint_contents
from compress import core, packing

MULTIPLIERS = ("Linear", "Conv1d", "Conv2d")  # what stays as large is worth a word
SMALL = 0.995  # a layer that keeps more of its bytes than this has stayed as it was


@dataclass(frozen=True)
class LayerSize:
    """A module's own tensors: what it is, its numbers, its bytes in a file."""

    kind: str
    description: str
    parameters: int
    bytes: int
    kept: str = ""  # why the method left it alone


@dataclass(frozen=True)
class Row:
    """A layer before and what stands in its place after."""

    name: str
    before: str
    after: str
    parameters: int
    bytes_before: int
    bytes_after: int
    kept: str = ""  # why it stayed as large


def layer_sizes(model: nn.Module) -> dict[str, LayerSize]:
    """Every module that has tensors of its own, by name."""
    sizes = {}
    for name, module in model.named_modules():
        own = packing.own_state(module)
        if own:
            sizes[name] = LayerSize(
                type(module).__name__,
                module.extra_repr(),
                core.parameter_count(module),
                packing.stored_bytes(own, getattr(module, "entropy_coding", False)),
                getattr(module, "kept", ""),
            )
    return sizes


def compare(
    before: dict[str, LayerSize], model: nn.Module, steps: Sequence[core.Step]
) -> list[Row]:
    """One row a layer of the model as it was; layers below a replaced one count to it.

    Then those that only the new model has: a student's norms of shared blocks.
    """
    after = layer_sizes(model)
    rows = []
    counted: set[str] = set()
    for name, old in before.items():
        parts = {n: new for n, new in after.items() if n == name or n.startswith(f"{name}.")}
        if old.kind not in MULTIPLIERS:  # a container's own tensors, not its children
            parts = {n: new for n, new in parts.items() if n == name}
        counted |= parts.keys()
        size = sum(new.bytes for new in parts.values())
        kinds = ", ".join(dict.fromkeys(new.kind for new in parts.values())) or "removed"
        same = [(new.kind, new.description) for new in parts.values()]
        kept = ""
        plain = old.kind in MULTIPLIERS and same == [(old.kind, old.description)]
        if plain and size > SMALL * old.bytes:
            kept = parts[name].kept or _reason(model, name, steps)
        parameters = sum(new.parameters for new in parts.values())
        rows.append(Row(name, old.kind, kinds, parameters, old.bytes, size, kept))
    for name, new in after.items():
        if name not in counted:
            rows.append(Row(name, "added", new.kind, new.parameters, 0, new.bytes))
    return rows


def _reason(model: nn.Module, layer: str, steps: Sequence[core.Step]) -> str:
    """Why a plain layer is as it was after the steps."""
    changes = core.changes(steps)
    reasons = filter(None, (core.why_kept(model, layer, step) for step in changes))
    return " and ".join(dict.fromkeys(reasons)) or "not selected by include and exclude"


def file_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the file that the checkpoint, without resume state, would be."""
    contents = checkpoint_contents(checkpoint)
    contents.pop("training", None)
    counter = _Counter()
    torch.save(contents, cast(IO[bytes], counter))
    return counter.bytes


class _Counter(io.RawIOBase):
    """A file that keeps only its length."""

    bytes = 0

    def write(self, data: Any) -> int:
        self.bytes += memoryview(data).nbytes
        return memoryview(data).nbytes


def layer_table(rows: Sequence[Row]) -> str:
    """Layer by layer: names, bytes before and after, what stands there now."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'layer':{width}}  {'before':>10}  {'after':>10}  now"]
    for row in rows:
        kept = f" (as large as before: {row.kept})" if row.kept else ""
        sizes = f"{row.bytes_before:>10,}  {row.bytes_after:>10,}"
        lines.append(f"{row.name:{width}}  {sizes}  {row.after}{kept}")
    return "\n".join(lines)


def summary_table(rows: Sequence[Row], file_before: int, file_after: int) -> str:
    """By kinds of layers, then the files, then what stayed as large and why."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        change = row.before if row.before == row.after else f"{row.before} -> {row.after}"
        groups.setdefault(change, []).append(row)
    width = max(26, *map(len, groups))
    lines = [f"{'':{width}}  layers  parameters  bytes before   bytes after  ratio"]
    table = [
        (change, str(len(group)), *_sums(group))
        for change, group in sorted(groups.items(), key=lambda g: -_sums(g[1])[1])
    ]
    parameters = sum(row.parameters for row in rows)
    table.append(("file", "", parameters, file_before, file_after))
    for label, count, numbers, before, after in table:
        ratio = f"{before / after:.2f}" if before and after else "–"  # of removed and added ones
        lines.append(
            f"{label:{width}}  {count:>6}  {numbers:>10,}  {before:>12,}  {after:>12,}  {ratio:>5}"
        )
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.kept:
            reasons.setdefault(row.kept, []).append(row.name)
    for reason, names in reasons.items():
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lines.append(f"as large as before: {shown}: {reason}")
    return "\n".join(lines)


def _sums(rows: Sequence[Row]) -> tuple[int, int, int]:
    return (
        sum(row.parameters for row in rows),
        sum(row.bytes_before for row in rows),
        sum(row.bytes_after for row in rows),
    )


def as_json(rows: Sequence[Row], file_before: int, file_after: int) -> dict[str, Any]:
    """The report for compression.json."""
    return {
        "parameters": sum(row.parameters for row in rows),
        "bytes_before": file_before,
        "bytes_after": file_after,
        "ratio": round(file_before / file_after, 4),
        "layers": [asdict(row) for row in rows],
    }
