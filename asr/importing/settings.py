"""model_config.yaml of a NeMo model as this project's configs; what these cannot say is refused.

Every key of the preprocessor, the encoder and the decoder is either used, or known to change
nothing when a trained model runs, or an `ArchiveError` that names it. Defaults are those of NeMo
3.0.0's constructors; older versions have the same where a key exists.
"""

from __future__ import annotations

import math
import re
import reprlib
from dataclasses import dataclass, field
from typing import Any

from asr.importing.archive import ArchiveError
from asr.runtime.config import FeatureConfig, ModelConfig

CTC = {"EncDecCTCModel", "EncDecCTCModelBPE"}
HYBRID = {"EncDecHybridRNNTCTCModel", "EncDecHybridRNNTCTCBPEModel"}
NEW_FRAMES = (2, 5)  # from this version of NeMo on: n // hop frames, zeros beyond the ends
LARGEST = 2**20  # of all settings; a filter bank of damaged sizes would fill the memory
TRAINING_ONLY = (
    "dither", "pad_to", "pad_value", "rng", "nb_augmentation_prob", "nb_max_freq", "use_grads",
    "stft_exact_pad", "stft_conv", "dropout_pre_encoder", "dropout_emb", "dropout_att",
    "stochastic_depth_drop_prob", "stochastic_depth_mode", "stochastic_depth_start_layer",
    "att_context_probs", "sync_max_audio_length", "pos_emb_max_len", "init_mode",
    "subsampling_conv_chunking_factor", "use_pytorch_sdpa", "use_pytorch_sdpa_backends",
    "untie_biases",
)  # fmt: skip


@dataclass
class Plan:
    """What the yaml asks for."""

    features: FeatureConfig
    model: ModelConfig
    vocabulary: list[str]  # NeMo's, without the blank, which is the last row of its head
    head: str  # prefix of the head's tensors
    xscaling: bool
    bias: bool  # of the blocks' linears and convolutions
    notes: list[str] = field(default_factory=list)


class Section:
    """A part of the yaml; each key is taken once, and `finish` refuses those that are left."""

    def __init__(self, config: dict[str, Any], *path: str) -> None:
        values: Any = config
        for key in path:
            values = values.get(key) if isinstance(values, dict) else None
        self.name = ".".join(path)
        if not isinstance(values, dict):
            raise ArchiveError(f"model_config.yaml: has no {self.name!r}")
        self._config = config
        self._left = dict(values)

    def take(self, key: str, default: Any = None) -> Any:
        value = self._left.pop(key, default)
        return default if value is None else resolve(self._config, value, f"{self.name}.{key}")

    def whole(self, key: str, default: int) -> int:
        value = self.take(key, default)
        if type(value) is not int or abs(value) > LARGEST:
            self.refuse(key, value, "is not a usable whole number")
        return value

    def number(self, key: str, default: float, null: float | None = None) -> float:
        """`null`, if given, is what an explicit null means."""
        if null is not None and self._left.get(key, default) is None:
            default = null
        value = self.take(key, default)
        try:
            number = float(value)  # "1e-05" is a text in yaml
        except (TypeError, ValueError):
            number = math.nan
        if not abs(number) < LARGEST:
            self.refuse(key, value, "is not a usable number")
        return number

    def only(self, key: str, default: Any, *others: Any) -> Any:
        value = self.take(key, default)
        if value not in (default, *others):
            shown = " or ".join(map(str, (default, *others)))
            self.refuse(key, value, f"cannot be expressed here, only {shown}")
        return value

    def target(self, key: str, *names: str) -> None:
        value = str(self.take(key, names[0])).rpartition(".")[2]
        if value not in names:
            self.refuse(key, value, f"is not a {' or '.join(names)}")

    def refuse(self, key: str, value: Any, why: str) -> Any:
        raise ArchiveError(f"model_config.yaml: {self.name}.{key}: {reprlib.repr(value)} {why}")

    def finish(self) -> None:
        for key, value in self._left.items():
            if key not in TRAINING_ONLY and value not in (None, False, [], {}):
                self.refuse(key, value, "is a setting that this importer does not know")


def resolve(config: dict[str, Any], value: Any, where: str, depth: int = 8) -> Any:
    """The value, of an interpolation such as ${model.preprocessor.features} what it points to."""
    if not isinstance(value, str) or "${" not in value:
        return value
    path = re.fullmatch(r"\$\{\s*([\w.]+)\s*\}", value)
    found: Any = config
    for key in path[1].removeprefix("model.").split(".") if path else ["?"]:
        found = found.get(key) if isinstance(found, dict) else None
    if found is None or depth == 0:
        raise ArchiveError(f"model_config.yaml: {where}: {value[:80]!r} leads to nothing")
    return resolve(config, found, where, depth - 1)


def read_plan(config: dict[str, Any], frontend: str = "") -> Plan:
    """The plan of a NeMo config; `frontend` is "old" or "new", or "" for what its version says."""
    head, decoder = _head(config)
    notes: list[str] = []
    features = _features(Section(config, "preprocessor"), frontend or _frontend(config))
    encoder = Section(config, "encoder")
    if encoder.whole("feat_in", features.n_mels) != features.n_mels:
        encoder.refuse("feat_in", "", f"differs from preprocessor.features {features.n_mels}")
    dimensions, xscaling, bias = _encoder(encoder, notes)
    decoder.target("_target_", "ConvASRDecoder")
    width = decoder.whole("feat_in", dimensions["d_model"])
    if width != dimensions["d_model"]:
        decoder.refuse("feat_in", width, "differs from encoder.d_model")
    vocabulary = decoder.take("vocabulary") or resolve(config, config.get("labels"), "labels")
    if not isinstance(vocabulary, list) or not all(type(t) is str and t for t in vocabulary):
        decoder.refuse("vocabulary", vocabulary, "is not a list of texts")
    count = decoder.whole("num_classes", len(vocabulary))
    if count not in (-1, len(vocabulary)):
        decoder.refuse("num_classes", count, f"differs from the vocabulary's {len(vocabulary)}")
    decoder.only("add_blank", True)
    for key in ("multisoftmax", "language_keys", "language_masks"):
        decoder.take(key)  # IndicConformer: see `vocabulary`
    decoder.finish()
    try:
        model = ModelConfig(vocab_size=len(vocabulary) + 1, n_mels=features.n_mels, **dimensions)
    except ValueError as error:
        raise ArchiveError(f"model_config.yaml: encoder: {error}") from None
    return Plan(features, model, list(vocabulary), head, xscaling, bias, notes)


def version(config: dict[str, Any]) -> tuple[int, ...]:
    """The version of NeMo that wrote the archive, (0,) where it does not say."""
    numbers = re.match(r"(\d+)\.(\d+)", str(config.get("nemo_version", "")))
    return tuple(map(int, numbers.groups())) if numbers else (0,)


def _frontend(config: dict[str, Any]) -> str:
    return "new" if version(config) >= NEW_FRAMES else "old"


def _head(config: dict[str, Any]) -> tuple[str, Section]:
    """The prefix of the CTC head's tensors, and its section."""
    kind = str(config.get("target", "")).rpartition(".")[2]
    if kind in HYBRID or (not kind and "aux_ctc" in config):
        return "ctc_decoder.", Section(config, "aux_ctc", "decoder")
    if kind in CTC or (not kind and "joint" not in config):
        return "decoder.", Section(config, "decoder")
    transducer = "a transducer without a CTC head" if "joint" in config else "not a CTC model"
    raise ArchiveError(
        f"model_config.yaml: target: {kind[:60] or 'joint'!r} is {transducer}; models that import: "
        f"{', '.join(sorted(CTC | HYBRID))}"
    )


def _features(section: Section, frontend: str) -> FeatureConfig:
    section.target("_target_", "AudioToMelSpectrogramPreprocessor")
    rate = section.whole("sample_rate", 16000)
    window, hop = (
        section.whole(f"n_{key}", int(section.number(key, default) * rate))
        for key, default in (("window_size", 0.02), ("window_stride", 0.01))
    )
    for key, only in (
        ("window", "hann"), ("lowfreq", 0), ("highfreq", rate / 2), ("mel_norm", "slaney"),
        ("mag_power", 2.0), ("log", True), ("log_zero_guard_type", "add"),
        ("log_zero_guard_value", 2**-24), ("frame_splicing", 1), ("exact_pad", False),
        ("use_torchaudio", False),
    ):  # fmt: skip
        section.only(key, only)
    preemphasis = section.number("preemph", 0.97, null=0.0)
    normalize = section.take("normalize", "per_feature")
    fixed: dict[str, Any] = {}
    if normalize == "all_features":
        section.refuse("normalize", normalize, "cannot be expressed here")
    if isinstance(normalize, dict) and {"fixed_mean", "fixed_std"} <= normalize.keys():
        fixed = {"mean": normalize["fixed_mean"], "std": normalize["fixed_std"]}
    kind = "fixed" if fixed else "per_feature" if normalize == "per_feature" else "none"
    n_fft = section.whole("n_fft", 2 ** max(0, (window - 1).bit_length()))
    n_mels = section.whole("features", 64)
    section.finish()
    if n_fft * n_mels > 4 * LARGEST:
        section.refuse("n_fft", n_fft, f"is too large with {n_mels} features")
    try:
        return FeatureConfig(
            sample_rate=rate, n_mels=n_mels, n_fft=n_fft, win_length=window,
            hop_length=hop, preemphasis=preemphasis, last_frame=frontend == "old",
            padding="reflect" if frontend == "old" else "zeros", normalization=kind, **fixed,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise ArchiveError(f"model_config.yaml: preprocessor: {error}") from None


def _encoder(section: Section, notes: list[str]) -> tuple[dict[str, Any], bool, bool]:
    """ModelConfig's dimensions, and whether there are xscaling and biases."""
    section.target("_target_", "ConformerEncoder")
    d_model = section.whole("d_model", 0)
    if section.take("feat_out", -1) not in (-1, 0, d_model):
        section.refuse("feat_out", "", "differs from d_model: a projection that is not in ours")
    channels = section.whole("subsampling_conv_channels", -1)
    dimensions = {
        "d_model": d_model,
        "n_layers": section.whole("n_layers", 0),
        "n_heads": section.whole("n_heads", 4),
        "ff_expansion": section.whole("ff_expansion_factor", 4),
        "conv_kernel_size": section.whole("conv_kernel_size", 31),
        "subsampling": section.only("subsampling", "striding", "dw_striding"),
        "subsampling_factor": section.whole("subsampling_factor", 4),
        "subsampling_channels": d_model if channels == -1 else channels,
        "dropout": section.number("dropout", 0.1),
    }
    for key, only in (
        ("reduction", None), ("reduction_position", None), ("reduction_factor", 1),
        ("causal_downsampling", False), ("conv_norm_type", "batch_norm"),
    ):  # fmt: skip
        section.only(key, only)
    half = dimensions["conv_kernel_size"] // 2
    context = section.take("conv_context_size", [half, half])
    if context != [half, half]:
        section.refuse("conv_context_size", context, "cannot be expressed here: not symmetric")
    attention = section.only("self_attention_model", "rel_pos", "rel_pos_local_attn")
    reach = section.take("att_context_size", [-1, -1])
    style = section.take("att_context_style", "regular")
    limited = reach not in ([-1, -1], [[-1, -1]])
    if limited and style != "regular":
        section.refuse("att_context_style", style, "cannot be expressed here, only regular")
    for key in ("global_tokens", "global_tokens_spacing", "global_attn_separate"):
        section.take(key)
    if limited or attention != "rel_pos":
        notes.append(
            f"encoder.att_context_size {reach}: trained with limited attention, runs with full, as "
            'after NeMo\'s change_attention_model("rel_pos")'
        )
    xscaling = section.only("xscaling", True, False)
    bias = section.only("use_bias", True, False)
    section.finish()
    return dimensions, xscaling, bias
