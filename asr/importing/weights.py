"""NeMo's tensors under our names: every one is used, dropped by a named rule, or an error.

The same names and shapes in NeMo 1.0.0 to 3.0.0. A tensor may differ from ours in axes of length 1
only (NeMo's pointwise convolutions are our Linears).
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import torch
from torch import Tensor

from asr.importing.archive import ArchiveError
from asr.importing.settings import Plan
from asr.network.model import ConformerCTC

PARTS = {
    "norm_feed_forward1": "ff1.norm", "feed_forward1.linear1": "ff1.up",
    "feed_forward1.linear2": "ff1.down", "norm_self_att": "attn.norm",
    "self_attn.linear_q": "attn.query", "self_attn.linear_k": "attn.key",
    "self_attn.linear_v": "attn.value", "self_attn.linear_pos": "attn.position",
    "self_attn.linear_out": "attn.out", "self_attn": "attn", "norm_conv": "conv.norm",
    "conv.pointwise_conv1": "conv.up", "conv.depthwise_conv": "conv.depthwise",
    "conv.batch_norm": "conv.batch_norm", "conv.pointwise_conv2": "conv.down",
    "norm_feed_forward2": "ff2.norm", "feed_forward2.linear1": "ff2.up",
    "feed_forward2.linear2": "ff2.down", "norm_out": "norm",
}  # fmt: skip
TENSORS = {"pos_bias_u": "bias_u", "pos_bias_v": "bias_v"}
DROPPED = re.compile(
    r"preprocessor\.featurizer\.(window|fb)$"  # computed here; compared before
    r"|encoder\.(pos_enc\.pe|seq_range|att_mask)$"  # tables that early versions stored
)
TRANSDUCER = re.compile(r"(decoder\.prediction|joint)\.")  # the other branch of a hybrid
WITHOUT_BIAS = re.compile(
    r"blocks\.\d+\.(ff\d\.(up|down)|attn\.(query|key|value|out)|conv\.(up|depthwise|down))\.bias$"
)  # where encoder.use_bias is false


def our_name(name: str, head: str, separable: bool) -> str | None:
    """Our name of one of NeMo's tensors, None for one that has none."""
    module, _, tensor = name.rpartition(".")
    if module == f"{head}decoder_layers.0":
        return f"head.{tensor}"
    if module == "encoder.pre_encode.out":
        return f"subsampling.out.{tensor}"
    if found := re.fullmatch(r"encoder\.pre_encode\.conv\.(\d+)", module):
        number = int(found[1])
        if not separable:  # convolution, ReLU, ...
            return f"subsampling.convs.{number // 2}.{tensor}" if number % 2 == 0 else None
        stage, part = divmod(number + 1, 3)  # one, ReLU, then depthwise, pointwise, ReLU, ...
        kind = "convs" if number == 0 or part == 0 else "pointwise" if part == 1 else None
        return f"subsampling.{kind}.{stage}.{tensor}" if kind else None
    if found := re.fullmatch(r"encoder\.layers\.(\d+)\.(\w+(?:\.\w+)?)", module):
        place = PARTS.get(found[2])
        return f"blocks.{found[1]}.{place}.{TENSORS.get(tensor, tensor)}" if place else None
    return None


def build_model(state: dict[str, Tensor], plan: Plan, rows: list[int]) -> ConformerCTC:
    """The model of a state dict in NeMo's names, whose entries are used up; in evaluation mode.

    `rows` are the rows of the head in our order. Raises ArchiveError for a tensor that is missing,
    left over, of another shape or type.
    """
    layers = {name.split(".")[2] for name in state if name.startswith("encoder.layers.")}
    if len(layers) != plan.model.n_layers:
        raise ArchiveError(
            f"encoder.n_layers is {plan.model.n_layers}, but there are weights of {len(layers)}"
        )
    separable = plan.model.subsampling == "dw_striding"
    try:
        with torch.device("meta"):
            model = ConformerCTC(replace(plan.model, vocab_size=len(rows)))
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ArchiveError(f"its dimensions are too large ({error!s:.60})") from None
    expected = model.state_dict()
    shapes = {key: x.shape for key, x in expected.items()}
    outputs = len(plan.vocabulary) + 1  # of all languages
    shapes |= {"head.weight": torch.Size([outputs, plan.model.d_model])}
    shapes |= {"head.bias": torch.Size([outputs])}
    ours: dict[str, Tensor] = {}
    for name in list(state):
        x = state.pop(name)
        key = our_name(name, plan.head, separable)
        if key not in shapes:
            if DROPPED.match(name) or (plan.head == "ctc_decoder." and TRANSDUCER.match(name)):
                continue
            raise ArchiveError(f"no place for the tensor {name!r} {list(x.shape)}")
        if not same_shape(x.shape, shapes[key]):
            raise ArchiveError(f"{name!r} is {list(x.shape)} where {list(shapes[key])} is expected")
        if x.is_floating_point() != expected[key].is_floating_point() or x.is_complex():
            raise ArchiveError(f"{name!r} holds {x.dtype}")
        ours[key] = x.to(expected[key].dtype).reshape(shapes[key]).contiguous()
    for key in shapes.keys() - ours.keys():
        if not plan.bias and WITHOUT_BIAS.match(key):
            ours[key] = torch.zeros(shapes[key])
        elif key.endswith("num_batches_tracked"):
            ours[key] = torch.tensor(0)
    if missing := sorted(shapes.keys() - ours.keys()):
        raise ArchiveError(f"has no weights for {', '.join(missing[:3])} ({len(missing)})")
    for key in ("head.weight", "head.bias"):
        ours[key] = ours[key][rows]
    if not plan.xscaling:  # ours multiplies by sqrt(d_model) what comes out of the subsampling
        for key in ("subsampling.out.weight", "subsampling.out.bias"):
            ours[key] = ours[key] / math.sqrt(plan.model.d_model)
    model.load_state_dict(ours, strict=True, assign=True)
    return model.eval()


def same_shape(one: torch.Size, other: torch.Size) -> bool:
    """Whether two shapes are equal but for axes of length 1."""
    return [n for n in one if n != 1] == [n for n in other if n != 1]
