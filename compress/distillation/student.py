"""A student made from its teacher: fewer, narrower or shared blocks, with the teacher's weights.

A block comes from the teacher's of the same place: of 8 blocks, 4 take every second. Where the
student is narrower, the units whose weights are largest stay: of d_model the same ones in the
whole model, inside a module those of that block. What cannot be filled so stays random.

A teacher that merges frames after some blocks has students that do so too; shared students, and
those of a preset, are at its last frame rate from the start, made of the blocks behind the merging.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from asr.network.model import ConformerCTC
from asr.network.parts import Turns
from asr.runtime.config import PRESETS, ModelConfig
from compress.imitation import counterpart

# What the axes of a tensor count, a letter each: D d_model (E: behind a reduction, R: of the frames
# that it merges), P positions (pairs of one frequency), F hidden features, A features of all heads,
# C channels, U channels twice; . as they are.
BLOCK = {
    "norm": "D", "ff.norm": "D", "attn.norm": "D", "conv.norm": "D",
    "ff.up.weight": "FD", "ff.up.bias": "F", "ff.down.weight": "DF", "ff.down.bias": "D",
    "attn.query.weight": "AD", "attn.query.bias": "A", "attn.key.weight": "AD",
    "attn.key.bias": "A", "attn.value.weight": "AD", "attn.value.bias": "A",
    "attn.position.weight": "AP", "attn.out.weight": "DA", "attn.out.bias": "D",
    "attn.bias_u": "A", "attn.bias_v": "A",
    "conv.up.weight": "UD", "conv.up.bias": "U", "conv.depthwise.weight": "C..",
    "conv.depthwise.bias": "C", "conv.batch_norm": "C", "conv.down.weight": "DC",
    "conv.down.bias": "D",
}  # fmt: skip
OUTSIDE = {
    "subsampling.out.weight": "D.", "subsampling.out.bias": "D", "head.weight": ".E",
    "conditioning.weight": "E.", "conditioning.bias": "E", "reduction.out.weight": "ER",
    "reduction.out.bias": "E",
}  # fmt: skip
Picks = dict[str, Tensor]  # letter -> the units of the teacher that the student takes
State = dict[str, Tensor]


def student_config(teacher: ModelConfig, preset: str, changes: dict[str, Any]) -> ModelConfig:
    """The teacher's dimensions, those of a preset in their place, and changes to these.

    Features, tokens, subsampling and frame rate stay the teacher's. Raises ValueError.
    """
    known = {} if not preset else {
        name: PRESETS[preset].get(name, getattr(ModelConfig(), name))
        for name in ("d_model", "n_layers", "n_heads", "ff_expansion", "conv_kernel_size")
    }  # fmt: skip
    given = known | {name: value for name, value in changes.items() if value}
    if teacher.reduction_position:
        given = known | merging(teacher, given, merged=bool(preset or "share_layers" in given))
    n = given.get("n_layers", teacher.n_layers)
    places = {round(i * n / teacher.n_layers) for i in teacher.intermediate_layers}
    first = given.get("reduction_position", teacher.reduction_position) + 1
    inner = tuple(sorted(min(max(i, first), n - 1) for i in places)) if n > first else ()
    given |= {
        "intermediate_layers": tuple(dict.fromkeys(inner)),
        "self_conditioned": teacher.self_conditioned and bool(inner),
    }
    if "share_layers" not in given and n != teacher.n_layers and teacher.share_layers > n:
        given |= {"share_layers": 0, "own_norms": False}
    if teacher.plain_blocks:
        student = replace(teacher, **given | {"plain_blocks": 0})
        plain = [depth < teacher.plain_blocks for depth in counterparts(student, teacher)]
        given["plain_blocks"] = 0 if student.share_layers else sum(plain)
    return replace(teacher, **given)


def merging(teacher: ModelConfig, given: dict[str, Any], merged: bool) -> dict[str, Any]:
    """`given` and where and how the student of a teacher with a reduction has one itself.

    `merged`: nowhere, its frames are merged from the start.
    """
    if merged:
        width = {
            "d_model": teacher.d_output,
            "n_layers": teacher.n_layers - teacher.reduction_position,
        }
        return width | given | {
            "reduction_position": 0, "reduction_factor": 1, "reduction_d_model": 0,
            "plain_blocks": 0, "subsampling_factor": teacher.total_factor,
        }  # fmt: skip
    n = given.get("n_layers", teacher.n_layers)
    if n < 2:
        raise ValueError(
            "n_layers 1: the teacher merges frames between its blocks, so a student needs 2 or "
            "more, or a --preset, which merges them before"
        )
    place = round(teacher.reduction_position * n / teacher.n_layers)
    changes: dict[str, Any] = {"reduction_position": min(max(place, 1), n - 1)}
    if "d_model" in given:  # both widths in proportion
        step = math.lcm(2, given.get("n_heads", teacher.n_heads))
        width = teacher.d_output * given["d_model"] / teacher.d_model
        changes["reduction_d_model"] = max(round(width / step), 1) * step
    return given | changes


def counterparts(student: ModelConfig, teacher: ModelConfig) -> list[int]:
    """The teacher's depth, from 0, of each block that the student stores, at equal rates."""
    stored, before = student.share_layers or student.n_layers, student.reduction_position
    split, n = teacher.reduction_position, teacher.n_layers
    front = [counterpart(i, before, split) for i in range(before)]
    behind = stored - before
    return front + [split + counterpart(i, behind, n - split) for i in range(behind)]


def build_student(teacher: ConformerCTC, config: ModelConfig, initial: str) -> ConformerCTC:
    """A model of that config; `initial` 'teacher' fills it with the teacher's weights.

    Blocks of an unshared teacher of the same widths are taken as they are, pruned or factorized.
    Raises ValueError where the teacher's layers do not allow what is asked.
    """
    student = ConformerCTC(config)
    if initial == "random":
        return student.eval()
    same = all(
        getattr(config, name) == getattr(teacher.config, name)
        for name in ("d_model", "d_output", "n_heads", "ff_expansion", "conv_kernel_size",
                     "subsampling_factor")
    )  # fmt: skip
    shared = bool(config.share_layers or teacher.config.share_layers)
    if same and not shared:
        student.blocks = nn.ModuleList(
            copy.deepcopy(teacher.blocks[depth]) for depth in counterparts(config, teacher.config)
        )
        for name, _ in list(student.named_children()):
            if name not in ("blocks", "dropout"):
                student.set_submodule(name, copy.deepcopy(teacher.get_submodule(name)))
        return student.eval()
    check_plain(teacher, "shared" if shared else "narrower")
    with torch.no_grad():
        fill(student, teacher)
    return student.eval()


def check_plain(teacher: ConformerCTC, what: str) -> None:
    """Raises ValueError if a layer of the teacher is not as its config says: pruned or replaced."""
    with torch.device("meta"):
        fresh = ConformerCTC(teacher.config).state_dict()
    for name, tensor in teacher.state_dict().items():
        if name not in fresh or fresh[name].shape != tensor.shape:
            raise ValueError(
                f"a {what} student cannot be made from this teacher: its blocks differ in shape "
                f"({name}), as after pruning or factorization; start from the model before it, "
                "or give --initial random"
            )


def fill(student: ConformerCTC, teacher: ConformerCTC) -> None:
    """Copies what fits: each of the student's tensors from the units picked of the teacher's."""
    config, theirs, source = student.config, teacher.config, teacher.state_dict()
    front, behind = outer_picks(config, teacher)
    outside = {letter: picks["D"] for letter, picks in (("D", front), ("E", behind)) if picks}
    if front and theirs.reduction_position:
        shifts = range(0, theirs.reduction_factor * theirs.d_model, theirs.d_model)
        outside["R"] = torch.cat([front["D"] + shift for shift in shifts])
    same_rate = config.subsampling_factor == theirs.subsampling_factor
    for name, target in student.state_dict().items():
        fits = name in source and (same_rate or not name.startswith("subsampling."))
        if fits and not name.startswith("blocks."):
            take(target, source[name], OUTSIDE.get(name, "." * target.dim()), outside)
    kept = len(teacher.blocks)
    for i, depth in enumerate(counterparts(config, theirs)):
        block, tensors = student.blocks[i], turn_state(teacher.blocks[depth % kept], depth // kept)
        width = config.d_model if i < config.reduction_position else config.d_output
        outer = front if depth < theirs.reduction_position else behind
        picks = {name: inner_picks(name, width, config, theirs, tensors) for name in MODULES}
        for key, target in block.state_dict().items():
            name = without_turn(block, key)
            if name in tensors:
                letters, module = axes_of(name, target.dim()), name.split(".")[0]
                take(target, tensors[name], letters, outer | picks.get(module, {}))


MODULES = ("ff1", "ff2", "attn", "conv")


def axes_of(name: str, dims: int) -> str:
    """The letters of a block's tensor; of a count of batches none."""
    name = name.replace("ff1.", "ff.").replace("ff2.", "ff.")
    return BLOCK.get(name) or (BLOCK[name.rpartition(".")[0]] if dims else "")


def without_turn(block: nn.Module, key: str) -> str:
    """The name that a tensor of a shared block has in an unshared one."""
    for name, module in block.named_modules():
        if isinstance(module, Turns) and key.startswith(f"{name}."):
            return f"{name}.{key.removeprefix(f'{name}.').partition('.')[2]}"
    return key


def turn_state(block: nn.Module, turn: int) -> State:
    """The tensors of a block in one of its turns, under the names of an unshared one's."""
    state: State = {}
    for key, value in block.state_dict().items():
        name = without_turn(block, key)
        position = len(name) - len(name.rpartition(".")[2]) - 1
        if name == key or key[position:].split(".")[1] == str(turn):
            state[name] = value
    return state


def take(target: Tensor, source: Tensor, letters: str, picks: Picks) -> None:
    """Copies the picked units along each axis; leaves the target where they do not fit."""
    if len(letters) < target.dim():  # the heads' biases (H, 1, d_head)
        source = source.flatten()
    for dim, letter in enumerate(letters):
        if letter != ".":
            if letter not in picks:
                return
            source = source.index_select(dim, picks[letter])
    if source.numel() == target.numel():
        target.copy_(source.view(target.shape))


def outer_picks(config: ModelConfig, teacher: ConformerCTC) -> tuple[Picks, Picks]:
    """The same units of d_model everywhere before a reduction, and everywhere behind it."""
    theirs, split, n = teacher.config, teacher.config.reduction_position, len(teacher.blocks)
    if not split:
        both = width_picks(teacher, range(n), "DE", theirs.d_model, config.d_model)
        return both, both
    return (
        width_picks(teacher, range(split), "DR", theirs.d_model, config.d_model),
        width_picks(teacher, range(split, n), "E", theirs.d_output, config.d_output),
    )


def width_picks(
    teacher: ConformerCTC, blocks: range, outside: str, width: int, wanted: int
) -> Picks:
    """`wanted` of the `width` units of these blocks and of the axes `outside` of what is around.

    Those of the largest weights, and the positions of the nearest frequencies; none if too few.
    """
    if wanted > width:
        return {}
    squares = torch.zeros(width)
    for name, tensor in teacher.state_dict().items():
        letters, counted = OUTSIDE.get(name, ""), outside
        if name.startswith("blocks."):
            number, inner = name.split(".", 2)[1:]
            block = teacher.blocks[int(number)]
            letters = axes_of(without_turn(block, inner), tensor.dim())
            counted = "D" if int(number) in blocks else ""
        for dim, letter in enumerate(letters if tensor.dim() > 1 else ""):
            if letter in counted:
                squares += along(tensor, dim).view(-1, width).sum(0)
    pairs = (torch.arange(wanted // 2) * width / wanted).round().long().clamp(max=width // 2 - 1)
    positions = torch.stack([2 * pairs, 2 * pairs + 1], dim=1).flatten()
    return {"D": largest(squares, wanted), "P": positions}


def inner_picks(
    name: str, width: int, config: ModelConfig, teacher: ModelConfig, tensors: State
) -> Picks:
    """The units inside a module of a block; none where the student has more than the teacher.

    `width` is the d_model of the student's block, `tensors` are the teacher's.
    """
    if name.startswith("ff"):
        squares = along(tensors[f"{name}.up.weight"], 0) + along(tensors[f"{name}.down.weight"], 1)
        wanted = width * config.ff_expansion
        return {"F": largest(squares, wanted)} if wanted <= len(squares) else {}
    if name == "conv":
        up, down = along(tensors["conv.up.weight"], 0), along(tensors["conv.down.weight"], 1)
        channels = len(down)
        if width > channels:
            return {}
        chosen = largest(up[:channels] + up[channels:] + down, width)
        return {"C": chosen, "U": torch.cat([chosen, chosen + channels])}
    squares = along(tensors["attn.out.weight"], 1)
    for reader in ("query", "key", "value"):
        squares = squares + along(tensors[f"attn.{reader}.weight"], 0)
    by_head = squares.view(teacher.n_heads, -1)
    heads, each = config.n_heads, width // config.n_heads
    if heads > len(by_head) or each > by_head.shape[1]:
        return {}
    features = [
        head * by_head.shape[1] + largest(by_head[head], each)
        for head in largest(by_head.sum(1), heads).tolist()
    ]
    return {"A": torch.cat(features)}


def along(tensor: Tensor, dim: int) -> Tensor:
    """Sums of squares along one axis."""
    return tensor.movedim(dim, 0).flatten(1).square().sum(1)


def largest(values: Tensor, count: int) -> Tensor:
    """Where the largest are, in ascending order of place."""
    return values.topk(count).indices.sort().values
