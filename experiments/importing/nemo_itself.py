"""Models that NeMo builds, runs and saves: run by the Python of an environment with NeMo in it.

    PYTHON experiments/importing/nemo_itself.py FOLDER

FOLDER/audio.npy is a waveform (N,) at 16 kHz. Of each kind of model NAME.nemo is written by NeMo's
own save_to, and NAME.npz with its features (T, n_mels) and log-probabilities (T', V + 1), blank
last; one is exported to NAME.onnx as well. How NeMo is installed without CUDA packages:

    pip install torch==2.13.0 hydra-core==1.3.2 omegaconf==2.3.0 lightning==2.4.0 torchmetrics
      "huggingface_hub<1" wrapt ruamel.yaml braceexpand editdistance einops "jiwer<4"
      "lhotse!=1.31.0" librosa soundfile sentencepiece webdataset numba scikit-learn pandas pydub
      text-unidecode packaging tqdm "numpy<2" "protobuf~=5.29.5" "fsspec==2024.12.0"
      "setuptools<81" wget "onnx<1.19" "transformers>=4.51,<=4.52" "datasets<4" "pyarrow<20"
      pyannote.core pyannote.metrics IPython onnxscript
    pip install --no-deps nemo_toolkit==2.4.0; for 3.0.0 also --no-deps: fiddle strenum overrides
      toml kaldialign nv-one-logger-core nv-one-logger-training-telemetry
      nv-one-logger-pytorch-lightning-integration
"""

import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from nemo import __version__
from nemo.collections.asr import models
from omegaconf import OmegaConf

ASR = "nemo.collections.asr.modules."
ENGLISH = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
HINDI = "".join(map(chr, range(0x0905, 0x093A)))
FAST: dict[str, Any] = {
    "d_model": 32, "n_heads": 4, "subsampling": "dw_striding", "subsampling_factor": 8,
    "subsampling_conv_channels": 12, "conv_kernel_size": 9,
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "d_model": 24, "n_heads": 2, "subsampling": "striding", "subsampling_factor": 4,
    "subsampling_conv_channels": 24, "conv_kernel_size": 31,
}  # fmt: skip


def tokenizer(folder: Path, letters: str, size: int) -> dict[str, str]:
    """A SentencePiece BPE of made sentences, as NeMo takes it."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(0)
    words = ["".join(draw.choices(letters, k=draw.randint(2, 6))) for _ in range(300)]
    texts = [" ".join(draw.choices(words, k=6)) + draw.choice(".,?") for _ in range(2000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=size, character_coverage=1.0, bos_id=-1, eos_id=-1, minloglevel=2,
        normalization_rule_name="identity",  # the usual one takes 240 kB
    )  # fmt: skip
    pieces = (folder / "tokenizer.vocab").read_text(encoding="utf-8").splitlines()
    listed = "\n".join(line.split("\t")[0].replace("▁", "##") for line in pieces)
    (folder / "vocab.txt").write_text(listed + "\n", encoding="utf-8")
    return {"dir": str(folder), "type": "bpe"}


def settings(encoder: dict[str, Any], mels: int = 80) -> dict[str, Any]:
    """What all models have."""
    width = encoder["d_model"]
    ctc = {"_target_": ASR + "ConvASRDecoder", "feat_in": width, "num_classes": -1,
           "vocabulary": []}  # fmt: skip
    return {
        "sample_rate": 16000,
        "preprocessor": {
            "_target_": ASR + "AudioToMelSpectrogramPreprocessor", "sample_rate": 16000,
            "normalize": "per_feature", "window_size": 0.025, "window_stride": 0.01,
            "window": "hann", "features": mels, "n_fft": 512, "frame_splicing": 1,
            "dither": 1e-5, "pad_to": 0,
        },
        "encoder": {
            "_target_": ASR + "ConformerEncoder", "feat_in": mels, "feat_out": -1, "n_layers": 2,
            "self_attention_model": "rel_pos", "att_context_size": [-1, -1], **encoder,
        },
        "decoder": ctc,
    }  # fmt: skip


def characters(folder: Path) -> Any:
    """Letters, capitals and signs."""
    config = settings(PLAIN)
    labels = [" ", *ENGLISH, *"'.,?"]
    config["labels"] = labels
    config["decoder"] |= {"vocabulary": labels, "num_classes": len(labels)}
    return models.EncDecCTCModel(cfg=OmegaConf.create(config))


def pieces(folder: Path) -> Any:
    """FastConformer with BPE pieces."""
    config = settings(FAST) | {"tokenizer": tokenizer(folder / "pieces", ENGLISH, 128)}
    return models.EncDecCTCModelBPE(cfg=OmegaConf.create(config))


def hybrid(folder: Path) -> Any:
    """A transducer with a CTC branch, 128 mels."""
    config = settings(FAST, 128) | {"tokenizer": tokenizer(folder / "hybrid", ENGLISH, 96)}
    width = FAST["d_model"]
    config["aux_ctc"] = {"ctc_loss_weight": 0.3, "decoder": config["decoder"]}
    config |= {
        "model_defaults": {"enc_hidden": width, "pred_hidden": 16, "joint_hidden": 16},
        "decoder": {"_target_": ASR + "RNNTDecoder", "blank_as_pad": True,
                    "prednet": {"pred_hidden": 16, "pred_rnn_layers": 1}},
        "joint": {"_target_": ASR + "RNNTJoint", "jointnet": {
            "joint_hidden": 16, "activation": "relu", "encoder_hidden": width,
            "pred_hidden": 16}},
        "decoding": {"strategy": "greedy_batch", "greedy": {"max_symbols": 10}},
        "loss": {"loss_name": "default"},
    }  # fmt: skip
    return models.EncDecHybridRNNTCTCBPEModel(cfg=OmegaConf.create(config))


def languages(folder: Path) -> Any:
    """Two languages, each with its own pieces, in one output layer."""
    langs = {"en": tokenizer(folder / "en", ENGLISH, 90), "hi": tokenizer(folder / "hi", HINDI, 80)}
    small = PLAIN | {"d_model": 16, "subsampling_conv_channels": 8}
    config = settings(small) | {"tokenizer": {"type": "agg", "langs": langs}}
    return models.EncDecCTCModelBPE(cfg=OmegaConf.create(config))


def randomise(model: Any) -> None:
    """Weights and statistics that make every part of the model felt."""
    torch.manual_seed(0)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if name.startswith("preprocessor") or not x.is_floating_point():
            continue
        if "norm" in name and name.endswith(("weight", "running_var")):
            torch.nn.init.uniform_(x, 0.5, 1.5)
        elif x.ndim == 1 or "pos_bias" in name:
            torch.nn.init.normal_(x, std=0.2)
        elif "decoder_layers" in name:
            torch.nn.init.normal_(x)


def numbers(model: Any, audio: Any) -> dict[str, Any]:
    """What the model makes of a waveform (N,): features and log-probabilities."""
    signal, length = torch.from_numpy(audio)[None], torch.tensor([len(audio)])
    with torch.inference_mode():
        features, frames = model.preprocessor(input_signal=signal, length=length)
        encoded, steps = model.encoder(audio_signal=features, length=frames)
        decoder = getattr(model, "ctc_decoder", model.decoder)
        log_probs = decoder(encoder_output=encoded)
    return {"features": features[0, :, : int(frames)].T.numpy(),
            "log_probs": log_probs[0, : int(steps)].numpy()}  # fmt: skip


def main(folder: Path) -> None:
    torch.onnx.export = partial(torch.onnx.export, dynamo=False)  # the exporter NeMo was made for
    audio = np.load(folder / "audio.npy")
    for build in (characters, pieces, hybrid, languages):
        model = build(folder).eval()
        randomise(model)
        head = getattr(model, "ctc_decoder", model.decoder).decoder_layers[0]
        with torch.no_grad():  # what all frames have in common would hide their differences
            head.bias -= torch.from_numpy(numbers(model, audio)["log_probs"].mean(0))
        np.savez(folder / f"{build.__name__}.npz", **numbers(model, audio))
        model.save_to(str(folder / f"{build.__name__}.nemo"))
        if build is pieces:
            model.export(str(folder / "pieces.onnx"))
    (folder / "version.txt").write_text(__version__)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
