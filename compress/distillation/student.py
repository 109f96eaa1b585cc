"""A student made from its teacher: fewer, narrower or shared blocks, with the teacher's weights.

A block comes from the teacher's of the same place: of 8 blocks, 4 take every second. Where the
student is narrower, the units whose weights are largest stay: of d_model the same ones in the
whole model, inside a module those of that block. What cannot be filled so stays random.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from asr.network.model import ConformerCTC
from asr.network.parts import Turns
from asr.runtime.config import PRESETS, ModelConfig
from compress.imitation import counterpart

# What the axes of a tensor count, a letter each: D d_model, P positions (pairs of one frequency),
# F hidden features, A features of all heads, C channels, U channels twice; . as they are.
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
    "subsampling.out.weight": "D.", "subsampling.out.bias": "D", "head.weight": ".D",
    "conditioning.weight": "D.", "conditioning.bias": "D",
}  # fmt: skip
Picks = dict[str, Tensor]  # letter -> the units of the teacher that the student takes
State = dict[str, Tensor]


def student_config(teacher: ModelConfig, preset: str, changes: dict[str, Any]) -> ModelConfig:
    """The teacher's dimensions, those of a preset in their place, and changes to these.

    Features, tokens and subsampling stay the teacher's. Raises ValueError.
    """
    known = {} if not preset else {
        name: PRESETS[preset].get(name, getattr(ModelConfig(), name))
        for name in ("d_model", "n_layers", "n_heads", "ff_expansion", "conv_kernel_size")
    }  # fmt: skip
    given = known | {name: value for name, value in changes.items() if value}
    n = given.get("n_layers", teacher.n_layers)
    places = {round(i * n / teacher.n_layers) for i in teacher.intermediate_layers}
    inner = tuple(sorted(min(max(i, 1), n - 1) for i in places)) if n > 1 else ()
    given |= {
        "intermediate_layers": tuple(dict.fromkeys(inner)),
        "self_conditioned": teacher.self_conditioned and bool(inner),
    }
    if "share_layers" not in given and n != teacher.n_layers and teacher.share_layers > n:
        given |= {"share_layers": 0, "own_norms": False}
    return replace(teacher, **given)


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
        for name in ("d_model", "n_heads", "ff_expansion", "conv_kernel_size")
    )
    shared = bool(config.share_layers or teacher.config.share_layers)
    if same and not shared:
        blocks = [
            copy.deepcopy(teacher.blocks[counterpart(i, config.n_layers, len(teacher.blocks))])
            for i in range(config.n_layers)
        ]
        student.blocks = nn.ModuleList(blocks)
        for name in ("subsampling", "head", *(["conditioning"] if config.self_conditioned else [])):
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
    config, source = student.config, teacher.state_dict()
    outer = outer_picks(config, teacher)
    for name, target in student.state_dict().items():
        if not name.startswith("blocks.") and name in source:
            take(target, source[name], OUTSIDE.get(name, "." * target.dim()), outer)
    stored, kept = len(student.blocks), len(teacher.blocks)
    for i, block in enumerate(student.blocks):
        depth = counterpart(i, stored, teacher.config.n_layers)
        tensors = turn_state(teacher.blocks[depth % kept], depth // kept)
        picks = {name: inner_picks(name, config, teacher.config, tensors) for name in MODULES}
        for key, target in block.state_dict().items():
            name = without_turn(block, key)
            module = name.split(".")[0]
            letters = axes_of(name, target.dim())
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


def outer_picks(config: ModelConfig, teacher: ConformerCTC) -> Picks:
    """The same units of d_model everywhere, and the positions of the nearest frequencies."""
    width, wanted = teacher.config.d_model, config.d_model
    if wanted > width:
        return {}
    squares = torch.zeros(width)
    for name, tensor in teacher.state_dict().items():
        letters = OUTSIDE.get(name, "")
        if name.startswith("blocks.") and tensor.dim() > 1:
            block = teacher.blocks[int(name.split(".")[1])]
            letters = axes_of(without_turn(block, name.split(".", 2)[2]), tensor.dim())
        if "D" in letters and tensor.dim() > 1:
            squares += along(tensor, letters.index("D"))
    pairs = (torch.arange(wanted // 2) * width / wanted).round().long().clamp(max=width // 2 - 1)
    positions = torch.stack([2 * pairs, 2 * pairs + 1], dim=1).flatten()
    return {"D": largest(squares, wanted), "P": positions}


def inner_picks(name: str, config: ModelConfig, teacher: ModelConfig, tensors: State) -> Picks:
    """The units inside a module of a block; none where the student has more than the teacher."""
    if name.startswith("ff"):
        squares = along(tensors[f"{name}.up.weight"], 0) + along(tensors[f"{name}.down.weight"], 1)
        wanted = config.d_model * config.ff_expansion
        return {"F": largest(squares, wanted)} if wanted <= len(squares) else {}
    if name == "conv":
        up, down = along(tensors["conv.up.weight"], 0), along(tensors["conv.down.weight"], 1)
        channels = len(down)
        if config.d_model > channels:
            return {}
        chosen = largest(up[:channels] + up[channels:] + down, config.d_model)
        return {"C": chosen, "U": torch.cat([chosen, chosen + channels])}
    squares = along(tensors["attn.out.weight"], 1)
    for reader in ("query", "key", "value"):
        squares = squares + along(tensors[f"attn.{reader}.weight"], 0)
    by_head = squares.view(teacher.n_heads, -1)
    heads, width = config.n_heads, config.d_model // config.n_heads
    if heads > len(by_head) or width > by_head.shape[1]:
        return {}
    features = [
        head * by_head.shape[1] + largest(by_head[head], width)
        for head in largest(by_head.sum(1), heads).tolist()
    ]
    return {"A": torch.cat(features)}


def along(tensor: Tensor, dim: int) -> Tensor:
    """Sums of squares along one axis."""
    return tensor.movedim(dim, 0).flatten(1).square().sum(1)


def largest(values: Tensor, count: int) -> Tensor:
    """Where the largest are, in ascending order of place."""
    return values.topk(count).indices.sort().values
