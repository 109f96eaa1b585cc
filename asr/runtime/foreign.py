"""Other people's NeMo `.onnx` files as they are: sherpa-onnx's, onnx-asr's, NeMo's own exports.

They take and give what our exports do, but put the blank last and keep the tokens in a file beside
them. The frontend is that of NeMo since 2.5, as in today's other runtimes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asr.runtime.config import FeatureConfig
from asr.runtime.tokenizer import BLANK, SPACE

LISTS = ("tokens.txt", "vocab.txt")  # beside the model: of sherpa-onnx, of onnx-asr
BLANKS = (BLANK, "<blank>", "<eps>", "<b>")
PROBE = 64  # frames: as many outputs say what the subsampling factor is


def read_token_list(path: Path) -> list[str]:
    """The tokens of a `token id` file in the order of their ids, which must be 0, 1, ..."""
    tokens: dict[int, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    for number, line in enumerate(lines, 1):
        token, _, id = line.rstrip().rpartition(" ")
        if not id.isdecimal() or int(id) in tokens:
            raise ValueError(f"{path}: line {number} is not a token and an id of its own")
        tokens[int(id)] = token.replace(" ", SPACE) or SPACE
    if sorted(tokens) != list(range(len(tokens))) or not tokens:
        raise ValueError(f"{path}: the ids are not 0, 1, ...")
    return [tokens[i] for i in range(len(tokens))]


def find_tokens(model: Path, outputs: int) -> tuple[list[str], int]:
    """The tokens of a model with so many outputs, without its blank, and where that stands."""
    found = [model.with_name(name) for name in LISTS if model.with_name(name).is_file()]
    if not found:
        raise ValueError(
            f"{model}: was not exported by this project and has no {' or '.join(LISTS)} beside it; "
            "put its list of tokens there"
        )
    tokens = read_token_list(found[0])
    if len(tokens) not in (outputs, outputs - 1):
        raise ValueError(f"{found[0]}: {len(tokens)} tokens for a model of {outputs} outputs")
    blank = next((i for i, token in enumerate(tokens) if token in BLANKS), len(tokens))
    if blank == len(tokens) == outputs:
        raise ValueError(f"{found[0]}: names no blank ({BLANK})")
    return [t for i, t in enumerate(tokens) if i != blank], blank


def frontend(model: Path, metadata: dict[str, str], n_mels: int) -> FeatureConfig:
    """Features as the metadata, or config.json beside the model, or else NeMo's default says."""
    config = model.with_name("config.json")
    settings: dict[str, Any] = {}
    if config.is_file():
        try:
            settings = json.loads(config.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{config}: not a JSON file") from None
    if isinstance(settings, dict) and settings.get("features_size", n_mels) != n_mels:
        raise ValueError(f"{config}: features_size is not the model's {n_mels}")
    kind = metadata.get("normalize_type", "per_feature")
    kinds = {"per_feature": "per_feature", "NA": "none", "": "none"}
    if kind not in kinds:
        raise ValueError(f"{model}: its normalize_type {kind!r} cannot be done here")
    return FeatureConfig(n_mels=n_mels, last_frame=False, normalization=kinds[kind])


class ForeignModel:
    """What is to be known of a session: `features`, `tokens` (blank first), `subsampling_factor`.

    `columns` puts its log-probabilities in the order of our tokens: first and last change places,
    as in an import. ValueError, in one line, for a model of another kind.
    """

    def __init__(self, path: Path, session: Any) -> None:
        inputs = {x.name: x.shape for x in session.get_inputs()}
        outputs = [x.name for x in session.get_outputs()]
        if {"audio_signal", "length"} != inputs.keys() or "logprobs" not in outputs:
            raise ValueError(
                f"{path}: takes {', '.join(inputs)[:80]} and gives {', '.join(outputs)[:80]}: "
                "neither exported by this project nor a NeMo CTC model"
            )
        n_mels = inputs["audio_signal"][1]
        if type(n_mels) is not int:
            raise ValueError(f"{path}: does not say how many mel bins it takes")
        metadata = dict(session.get_modelmeta().custom_metadata_map)
        self.features = frontend(path, metadata, n_mels)
        probe = np.zeros((1, n_mels, PROBE), np.float32)
        feed = {"audio_signal": probe, "length": np.array([PROBE], np.int64)}
        try:
            log_probs = session.run(["logprobs"], feed)[0]  # (1, T', V)
        except Exception as error:  # onnxruntime's errors share no class of their own
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"{path}: does not run: {reason}") from None
        self.subsampling_factor = PROBE // log_probs.shape[1]
        others, blank = find_tokens(path, log_probs.shape[2])
        rows = [i for i in range(log_probs.shape[2]) if i != blank]
        if blank == len(others):  # NeMo's order: the first goes where the blank was
            others, rows = [*others[1:], others[0]], [*rows[1:], rows[0]]
        self.tokens = [BLANK, *others]
        self.columns: npt.NDArray[np.intp] = np.array([blank, *rows])
