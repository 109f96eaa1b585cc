"""Imported models against NeMo's own numbers, and archives that are damaged or made to harm.

tests/data/nemo holds archives that NeMo 3.0.0 wrote (random weights), each with the features and
log-probabilities that NeMo computed for two recordings; `languages` is of nemo_itself.py.
"""

import gzip
import io
import pickle
import resource
import tarfile
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from asr.importing.archive import ArchiveError
from asr.importing.nemo import import_nemo
from asr.network.checkpoint import load_checkpoint
from asr.runtime.config import FeatureConfig
from asr.runtime.features import log_mel, n_frames, raw_log_mel
from experiments.importing import check_nemo
from scripts import import_model

DATA = Path(__file__).parent / "data" / "nemo"
NAMES = ("char", "bpe", "bpe_nobias", "hybrid")


def recordings(numbers) -> list[np.ndarray]:
    """The two waveforms of an archive's numbers, (N,) float32."""
    audio = numbers["audio"].astype(np.float32) / 32768
    start, end = numbers["second"]
    return [audio, audio[start:end]]


def blank_first(log_probs: np.ndarray) -> np.ndarray:
    """NeMo's columns in our order: the first and the last change places."""
    last = log_probs.shape[1] - 1
    return log_probs[:, [last, *range(1, last), 0]]


def log_probs_of(checkpoint, waveform: np.ndarray) -> np.ndarray:
    features = torch.from_numpy(log_mel(waveform, checkpoint.features))[None]
    with torch.inference_mode():
        return checkpoint.model(features).log_probs[0].numpy()


def members(name: str = "bpe") -> dict[str, bytes]:
    """The files in an archive by their names in it."""
    with tarfile.open(DATA / f"{name}.nemo") as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.isreg()}


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def with_settings(path: Path, change, name: str = "bpe") -> Path:
    """An archive whose yaml `change` has edited."""
    files = members(name)
    config = yaml.safe_load(files["./model_config.yaml"])
    change(config)
    files["./model_config.yaml"] = yaml.safe_dump(config, allow_unicode=True).encode()
    return write_tar(path, files)


def with_weights(path: Path, change, name: str = "bpe") -> Path:
    """An archive whose state dict `change` has edited or replaced."""
    files = members(name)
    state = torch.load(io.BytesIO(files["./model_weights.ckpt"]), weights_only=True)
    state = change(state) or state
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files["./model_weights.ckpt"] = buffer.getvalue()
    return write_tar(path, files)


@pytest.mark.parametrize("name", NAMES)
def test_from_audio_to_nemos_log_probabilities(name):
    numbers = np.load(DATA / f"{name}.npz")
    checkpoint = import_nemo(DATA / f"{name}.nemo").checkpoint
    for i, waveform in enumerate(recordings(numbers)):
        features = log_mel(waveform, checkpoint.features)
        frames = int(numbers["feature_len"][i])
        theirs = numbers["features"][i, :, :frames].T.astype(np.float32)  # stored as halves
        np.testing.assert_allclose(features, theirs, atol=4e-3)
        expected = blank_first(numbers["log_probs"][i, : numbers["out_len"][i]])
        np.testing.assert_allclose(log_probs_of(checkpoint, waveform), expected, atol=1e-4)


def test_one_language_of_an_aggregated_tokenizer_that_nemo_built():
    """NeMo's softmax is over 90 English and 80 Hindi pieces; what is imported is Hindi alone."""
    row = check_nemo.compare(DATA, "languages")
    assert row["log_probs"] < 1e-4
    assert row["tokens"] == 81
    tokenizer = import_nemo(DATA / "languages.nemo", "hi").checkpoint.tokenizer
    text = tokenizer.decode([5, 1, 9, 30])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not set(text) & set("abcdefghijklmnopqrstuvwxyz")


def test_the_tokens_are_nemos_with_the_blank_first():
    listed = yaml.safe_load(members()["./model_config.yaml"])["decoder"]["vocabulary"]
    tokenizer = import_nemo(DATA / "bpe.nemo").checkpoint.tokenizer
    assert tokenizer.tokens == ["<blk>", *listed[1:], "<unk>"]
    text = "ggee llcc"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    char = import_nemo(DATA / "char.nemo").checkpoint.tokenizer
    assert char.tokens[-1] == "▁"
    assert char.decode(char.encode("it's so")) == "it's so"


@pytest.mark.parametrize("kind", ["gzip", "folder", "plain names", "under model"])
def test_every_form_of_an_archive_gives_the_same_model(tmp_path, kind):
    files = members()
    path = tmp_path / "model.nemo"
    if kind == "gzip":
        path.write_bytes(gzip.compress((DATA / "bpe.nemo").read_bytes()))
    elif kind == "folder":
        path.mkdir()
        for name, data in files.items():
            (path / Path(name).name).write_bytes(data)
    elif kind == "plain names":  # as NeMo 1.0 wrote them
        config = yaml.safe_load(files["./model_config.yaml"])
        config["tokenizer"] = {"dir": "somewhere", "type": "bpe"}
        files["./model_config.yaml"] = yaml.safe_dump(config).encode()
        write_tar(path, {name.split("_", 1)[-1] if len(name) > 40 else name[2:]: data
                         for name, data in files.items()})  # fmt: skip
    else:
        config = yaml.safe_load(files["./model_config.yaml"])
        config["encoder"]["feat_in"] = "${model.preprocessor.features}"
        config["optim"] = {"lr": "1e-05"}
        files["./model_config.yaml"] = yaml.safe_dump({"model": config}).encode()
        write_tar(path, files)
    found, expected = import_nemo(path).checkpoint, import_nemo(DATA / "bpe.nemo").checkpoint
    assert found.features == expected.features
    assert found.tokenizer.tokens == expected.tokenizer.tokens
    assert found.tokenizer.sentencepiece_model == expected.tokenizer.sentencepiece_model
    for key, x in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[key], x), key


def test_half_precision_weights_become_float32(tmp_path):
    path = with_weights(
        tmp_path / "half.nemo",
        lambda state: {k: v.bfloat16() if v.is_floating_point() and "featurizer" not in k else v
                       for k, v in state.items()},
    )  # fmt: skip
    model = import_nemo(path).checkpoint.model
    exact = import_nemo(DATA / "bpe.nemo").checkpoint.model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.head.weight, exact.head.weight.bfloat16().float())


def refused(path: Path, *words: str, **options) -> None:
    with pytest.raises(ArchiveError) as error:
        import_nemo(path, **options)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("preprocessor.normalize", "all_features"), ("preprocessor.window", "hamming"),
        ("preprocessor.frame_splicing", 3), ("preprocessor.log_zero_guard_type", "clamp"),
        ("preprocessor.mag_power", 1.0), ("preprocessor.lowfreq", 20),
        ("preprocessor.unheard_of", 7), ("preprocessor.features", "many"),
        ("encoder.subsampling", "vggnet"), ("encoder.subsampling_factor", 3),
        ("encoder.causal_downsampling", True), ("encoder.conv_norm_type", "layer_norm"),
        ("encoder.conv_context_size", "causal"), ("encoder.self_attention_model", "abs_pos"),
        ("encoder.reduction_position", 1), ("encoder.feat_out", 40), ("encoder.n_heads", 3),
        ("encoder.n_layers", 10**9), ("encoder.d_model", 10**15),
        ("preprocessor.n_fft", 10**6), ("preprocessor.window_size", 1e9),
        ("encoder.d_model", 64),
        ("encoder.conv_kernel_size", 8), ("encoder.unheard_of", 7), ("encoder.feat_in", 64),
        ("encoder.ff_expansion_factor", 10**6), ("encoder.n_layers", "${encoder.n_layers}"),
        ("decoder.num_classes", 9), ("decoder.vocabulary", [1, 2]), ("decoder.unheard_of", 7),
        ("tokenizer.type", "morse"), ("encoder._target_", "nemo.SqueezeformerEncoder"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_refused_by_its_key(tmp_path, key, value):
    section, name = key.split(".")
    path = with_settings(tmp_path / "a.nemo", lambda config: config[section].update({name: value}))
    refused(path, str(path), {"ff_expansion_factor": "feed_forward1"}.get(name, name))


def test_transducers_and_unknown_models_are_refused_by_name(tmp_path):
    def transducer(config):
        config["target"] = "nemo.collections.asr.models.rnnt_bpe_models.EncDecRNNTBPEModel"
        config["joint"] = {}

    refused(with_settings(tmp_path / "a.nemo", transducer), "EncDecRNNTBPEModel", "without a CTC")
    path = with_settings(tmp_path / "b.nemo", lambda config: config.update(target="a.EncDecOther"))
    refused(path, "EncDecOther")


def test_limited_attention_is_said(tmp_path):
    def local(config):
        config["encoder"].update(
            self_attention_model="rel_pos_local_attn", att_context_size=[128, 128]
        )

    imported = import_nemo(with_settings(tmp_path / "a.nemo", local))
    assert "full" in imported.notes[0]
    streaming = dict(att_context_size=[70, 13], att_context_style="chunked_limited")
    path = with_settings(tmp_path / "b.nemo", lambda config: config["encoder"].update(streaming))
    refused(path, "att_context_style", "chunked_limited")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update({"encoder.adapter.weight": torch.ones(2)}), ["encoder.adapter.weight"]),
        (lambda s: {k: v for k, v in s.items() if k != "encoder.layers.1.norm_out.bias"},
         ["blocks.1.norm.bias"]),
        (lambda s: s.update({"encoder.layers.0.norm_out.bias": torch.ones(17)}),
         ["norm_out.bias", "[17]", "[16]"]),
        (lambda s: s.update({"encoder.layers.0.norm_out.bias": torch.ones(16, dtype=torch.int8)}),
         ["norm_out.bias", "int8"]),
        (lambda s: s.update({"preprocessor.featurizer.fb": torch.ones(1, 80, 257)}),
         ["featurizer.fb"]),
        (lambda s: s.update({"encoder.layers.0.norm_out.bias": torch.ones(1).expand(16)}),
         ["norm_out.bias", "claims"]),
        (lambda s: [s], ["no state dict"]),
        (lambda s: s.update({"more": {"nested": 1}}), ["more"]),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(tmp_path, change, words):
    refused(with_weights(tmp_path / "a.nemo", change), *words)


def test_not_a_number_is_found_by_the_check(tmp_path, capsys):
    path = with_weights(
        tmp_path / "a.nemo",
        lambda s: s.update({"decoder.decoder_layers.0.bias": torch.full((65,), torch.nan)}),
    )
    output = tmp_path / "model.pt"
    argv = ["--model_path", str(path), "--output_path", str(output)]
    assert import_model.main(argv) == 2
    assert "NaN" in capsys.readouterr().err
    assert not output.exists()


def languages(config) -> None:
    """Two languages of 32 tokens that share pieces, as in IndicConformer."""
    half = config["decoder"]["vocabulary"][:32]
    config["decoder"].update(vocabulary=half * 2, multisoftmax=True, language_keys=["hi", "ta"])
    config["tokenizer"] = {"type": "agg", "langs": {"hi": {"type": "bpe"}, "ta": {"type": "bpe"}}}


def test_one_language_of_several(tmp_path):
    path = with_settings(tmp_path / "a.nemo", languages)
    refused(path, "--language", "hi, ta")
    refused(path, "--language", language="en")
    checkpoint = import_nemo(path, language="ta").checkpoint
    state = torch.load(io.BytesIO(members()["./model_weights.ckpt"]), weights_only=True)
    head = state["decoder.decoder_layers.0.weight"][:, :, 0]
    assert checkpoint.model.config.vocab_size == 33
    assert torch.equal(checkpoint.model.head.weight[[0, 1, 32]], head[[64, 33, 32]])
    refused(DATA / "bpe.nemo", "one set of tokens", language="hi")


def test_word_pieces_run_but_do_not_encode(tmp_path):
    def wordpiece(config):
        config["tokenizer"] = {"type": "wpe"}
        config["decoder"]["vocabulary"] = ["[PAD]", "[UNK]", "play", "##ing", "x", "##x"] + [
            f"w{i}" for i in range(58)
        ]

    imported = import_nemo(with_settings(tmp_path / "a.nemo", wordpiece))
    tokenizer = imported.checkpoint.tokenizer
    assert tokenizer.decode([2, 3, 4, 5]) == "playing xx"
    assert "not trained" in imported.notes[0]
    with pytest.raises(ValueError, match="pieces"):
        tokenizer.encode("playing")


def test_old_archives_keep_their_ends_of_a_recording(tmp_path):
    path = with_settings(tmp_path / "a.nemo", lambda c: c.update(nemo_version="1.23.0"))
    features = import_nemo(path).checkpoint.features
    assert (features.last_frame, features.padding) == (True, "reflect")
    new = import_nemo(path, frontend="new").checkpoint.features
    assert (new.last_frame, new.padding) == (False, "zeros")


def test_frontend_settings_against_librosa():
    import librosa

    rng = np.random.default_rng(0)
    waveform = rng.standard_normal(16001).astype(np.float32)
    config = FeatureConfig(padding="reflect", n_mels=128, last_frame=False)
    x = np.append(waveform[:1], waveform[1:] - 0.97 * waveform[:-1])
    window = np.hanning(400)
    spectrum = librosa.stft(x, n_fft=512, hop_length=160, win_length=400, window=window,
                            center=True, pad_mode="reflect")  # fmt: skip
    filters = librosa.filters.mel(sr=16000, n_fft=512, n_mels=128)
    expected = np.log(filters @ np.abs(spectrum) ** 2 + 2.0**-24).T[:100]
    found = raw_log_mel(waveform, config)
    assert n_frames(16001, config) == len(found) == 100
    np.testing.assert_allclose(found, expected, atol=2e-3)
    mean, std = rng.standard_normal(128), rng.uniform(0.5, 2, 128)
    fixed = FeatureConfig(padding="reflect", n_mels=128, last_frame=False, normalization="fixed",
                          mean=tuple(mean), std=tuple(std))  # fmt: skip
    np.testing.assert_allclose(log_mel(waveform, fixed), (found - mean) / std, rtol=1e-4, atol=1e-4)
    plain = FeatureConfig(padding="reflect", n_mels=128, last_frame=False, normalization="none")
    assert np.array_equal(log_mel(waveform, plain), found)


def test_fixed_and_no_normalisation_come_from_the_yaml(tmp_path):
    mean, std = [0.5] * 80, [2.0] * 80
    normalize = {"fixed_mean": mean, "fixed_std": std}
    path = with_settings(
        tmp_path / "a.nemo", lambda c: c["preprocessor"].update(normalize=normalize, preemph=None)
    )
    features = import_nemo(path).checkpoint.features
    assert features.normalization == "fixed"
    assert (list(features.mean), list(features.std), features.preemphasis) == (mean, std, 0.0)
    path = with_settings(tmp_path / "b.nemo", lambda c: c["preprocessor"].update(normalize="NA"))
    assert import_nemo(path).checkpoint.features.normalization == "none"


# Damaged and harmful archives: one line, exit code 2, nothing run, nothing written, bounded memory.


class Harm:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def harmful(folder: Path, marker: Path) -> list[Path]:
    """Archives made to harm, each in its own way."""
    files = members()
    paths = []

    def tar(name: str, changes: dict[str, bytes], mode: str = "w") -> None:
        paths.append(write_tar(folder / f"{name}.nemo", {**files, **changes}, mode))

    weights, config = "./model_weights.ckpt", "./model_config.yaml"
    buffer = io.BytesIO()
    torch.save({"state": Harm(marker)}, buffer)
    tar("pickle", {weights: buffer.getvalue()})
    tar("bare-pickle", {weights: pickle.dumps(Harm(marker))})
    tag = f"target: !!python/object/apply:os.system ['touch {marker}']\n"
    tar("yaml-tag", {config: tag.encode()})
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in pairwise("abcdefghi")
    )
    tar("yaml-bomb", {config: bomb.encode()})
    tar("yaml-deep", {config: b"[" * 100_000})
    tar("yaml-binary", {config: bytes(range(256))})
    tar("yaml-empty", {config: b""})
    tar("yaml-list", {config: b"- 1\n- 2\n"})
    tar("zeros", {weights: bytes(2**28)}, "w:gz")  # 256 MB in 256 kB
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("archive/data.pkl", b"\x80\x02}.")
        zipped.writestr("archive/data/0", bytes(2**26))
    tar("zip-bomb", {weights: buffer.getvalue()})
    huge = {"encoder.x": torch.ones(1).expand(2**20, 2**20)}
    torch.save(huge, buffer := io.BytesIO())
    tar("strides", {weights: buffer.getvalue()})
    for name, missing in (("no-yaml", config), ("no-weights", weights)):
        rest = {key: data for key, data in files.items() if key != missing}
        paths.append(write_tar(folder / f"{name}.nemo", rest))
    for name, kind, target in (
        ("link", tarfile.SYMTYPE, "/etc/passwd"), ("hard-link", tarfile.LNKTYPE, "../../etc/passwd")
    ):  # fmt: skip
        with tarfile.open(folder / f"{name}.nemo", "w") as out:
            for member in (config, weights):
                info = tarfile.TarInfo(member)
                info.type, info.linkname = kind, target
                out.addfile(info)
        paths.append(folder / f"{name}.nemo")
    for name, prefix in (("absolute", "/tmp/"), ("outward", "../")):
        moved = {prefix + Path(key).name: data for key, data in files.items()}
        paths.append(write_tar(folder / f"{name}.nemo", moved))
    paths.append(write_tar(folder / "twice.nemo", {**files, "mp_rank_01/model_weights.ckpt": b""}))
    info = tarfile.TarInfo(weights)
    info.size = 2**40
    (folder / "claims.nemo").write_bytes(info.tobuf() + bytes(2000))
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**33
    (folder / "long-name.nemo").write_bytes(gzip.compress(info.tobuf() + bytes(2**27)))
    (folder / "empty.nemo").write_bytes(b"")
    (folder / "text.nemo").write_bytes(b"not an archive at all\n" * 100)
    with tarfile.open(folder / "many.nemo", "w") as out:
        for i in range(10_001):
            out.addfile(tarfile.TarInfo(f"{i}"))
    return [*paths, *(folder / f"{n}.nemo" for n in ("claims", "long-name", "empty", "text",
                                                     "many"))]  # fmt: skip


def damaged(folder: Path, count: int) -> list[Path]:
    """Cut archives, and some with bytes changed where that must be noticed: in headers and zips."""
    rng = np.random.default_rng(0)
    whole = (DATA / "bpe.nemo").read_bytes()
    packed = gzip.compress(whole)
    with tarfile.open(DATA / "bpe.nemo") as tar:
        weights = next(m for m in tar if m.name.endswith("ckpt"))
    paths = []
    for i in range(count):
        data = bytearray(packed if i % 4 == 3 else whole)
        if i % 2:
            data = data[: int(rng.integers(0, len(data) * 9 // 10))]
        else:  # the pickle, the zip's directory, the tar's header
            start, end = (
                (weights.offset_data + 60, weights.offset_data + 12_000),
                (weights.offset_data + weights.size - 9_000, weights.offset_data + weights.size),
                (weights.offset, weights.offset + 150),
            )[i % 3]
            for _ in range(60):
                data[int(rng.integers(start, end))] = int(rng.integers(0, 256))
        path = folder / f"{i}.nemo"
        path.write_bytes(data)
        paths.append(path)
    return paths


def test_damaged_archives_give_one_line_and_nothing_else(tmp_path, capsys):
    marker, output = tmp_path / "marker", tmp_path / "model.pt"
    folder = tmp_path / "archives"
    folder.mkdir()
    argv = ["--output_path", str(output), "--model_path"]
    assert import_model.main([*argv, str(DATA / "bpe.nemo")]) == 0  # all modules are in memory
    output.unlink()
    paths = harmful(folder, marker)
    paths += damaged(folder, 210 - len(paths))
    capsys.readouterr()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in paths:
        code = import_model.main([*argv, str(path)])
        shown = capsys.readouterr()
        assert (code, shown.out, shown.err.count("\n")) == (2, "", 1), (path.name, shown)
        assert shown.err.startswith("error: "), path.name
        assert len(shown.err) < 700, path.name
    assert not marker.exists()
    assert not output.exists()
    assert not list(tmp_path.glob("*.tmp"))
    assert len(paths) >= 200
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000, f"{grown} kB"


def test_the_command_writes_a_model_that_says_where_it_comes_from(tmp_path, capsys):
    output = tmp_path / "model.pt"
    argv = ["--model_path", str(DATA / "hybrid.nemo"), "--output_path", str(output)]
    assert import_model.main(argv) == 0
    shown = capsys.readouterr().out
    assert "scripts/export_onnx.py" in shown
    checkpoint = load_checkpoint(output)
    entry = checkpoint.history[0]
    assert (entry["step"], entry["source"]) == ("import", "hybrid.nemo")
    assert len(entry["sha256"]) == 64
    assert entry["nemo_version"] == "3.0.0"
    expected = import_nemo(DATA / "hybrid.nemo").checkpoint.model.state_dict()
    assert all(torch.equal(x, expected[k]) for k, x in checkpoint.model.state_dict().items())
    assert import_model.main(argv) == 2
    assert "is there already" in capsys.readouterr().err
