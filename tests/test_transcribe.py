"""From audio to text: the command, long recordings, and everything a user may get wrong."""

import io
import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile

import asr
from asr import load
from asr.runtime import pieces, shipped
from asr.runtime.backends import Info, explain
from asr.runtime.config import FeatureConfig
from asr.runtime.decoding import greedy_decode
from asr.runtime.readings import meeting_frame
from asr.runtime.recognizer import SILENCE, Recognizer
from asr.runtime.tokenizer import Tokenizer
from asr.runtime.transcribe import main
from tests.conftest import babble

ROOT = Path(__file__).resolve().parents[1]
UNIT = 640  # samples an output frame


def run(tiny_onnx, *more):
    flags = ["--model_path", tiny_onnx, "--threads", "1", "--min_confidence", "0"]
    return main([*map(str, flags), *map(str, more)])


# ---- the command ----------------------------------------------------------------------------


def test_one_file_gives_its_text(tiny_onnx, clip, capsys):
    assert run(tiny_onnx, "--audio_path", clip) == 0
    out, err = capsys.readouterr()
    assert out == load(tiny_onnx, min_confidence=0).transcribe(clip).text + "\n"
    assert out.strip()
    assert err == ""


def test_text_goes_to_a_file_whose_folder_is_made(tiny_onnx, clip, tmp_path, capsys):
    target = tmp_path / "new" / "text.txt"
    assert run(tiny_onnx, "--audio_path", clip, "--output_text", target) == 0
    assert target.read_text() == load(tiny_onnx, min_confidence=0).transcribe(clip).text + "\n"
    assert [p.name for p in target.parent.iterdir()] == ["text.txt"]
    assert capsys.readouterr().out == ""


def test_files_and_folders_give_a_line_each(tiny_onnx, clip, tmp_path, capsys):
    for name in ("b.wav", "deep/a.FLAC", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no audio")
        else:
            soundfile.write(path, babble(1.0, seed=len(name)), 16000)
    assert run(tiny_onnx, "--audio_path", clip, tmp_path) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    files = [clip, tmp_path / "b.wav", tmp_path / "deep" / "a.FLAC"]
    assert [path for path, _ in lines] == [str(path) for path in files]
    assert [text for _, text in lines] == [
        load(tiny_onnx, min_confidence=0).transcribe(path).text for path in files
    ]


def test_a_folder_with_one_file_gives_a_named_line(tiny_onnx, clip, capsys):
    assert run(tiny_onnx, "--audio_path", clip.parent) == 0
    assert capsys.readouterr().out.startswith(f"{clip}\t")


def test_one_bad_file_of_several_does_not_stop_the_others(tiny_onnx, clip, tmp_path, capsys):
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"RIFF")
    target = tmp_path / "text.txt"
    assert run(tiny_onnx, "--audio_path", bad, clip, "--output_text", target) == 2
    assert target.read_text().startswith(f"{clip}\t")
    err = capsys.readouterr().err.splitlines()
    assert str(bad) in err[0]
    assert err[1] == "1 of 2 files failed"


def test_formats_and_folders(tiny_onnx, clip, tmp_path, capsys):
    assert run(tiny_onnx, clip, "--output_path", tmp_path / "a.srt") == 0
    assert (tmp_path / "a.srt").read_text().startswith("1\n00:00:0")
    assert run(tiny_onnx, clip.parent, "--output_path", tmp_path, "--output_format", "json") == 0
    assert json.loads((tmp_path / "clip.json").read_text())["segments"][0]["words"]
    assert capsys.readouterr() == ("", "")
    assert run(tiny_onnx, clip, clip.parent, "--output_format", "words") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "audio_filepath\tstart\tend\tconfidence\tword"
    assert len({line.split("\t")[0] for line in lines[1:]}) == 1


def test_several_recordings_give_their_results_as_they_come(tiny_onnx, clip):
    """A path, an open file, bytes in memory, an array: the second is not read for the first."""
    reader, samples = load(tiny_onnx, threads=1, min_confidence=0), soundfile.read(clip)[0]
    with open(clip, "rb") as file:
        kinds = [clip, str(clip), file, io.BytesIO(clip.read_bytes()), samples]
        texts = {result.text for result in reader.transcribe(kinds)}
    assert texts == {reader.transcribe(clip).text} != {""}
    results = reader.transcribe(iter([clip, "absent.wav"]))
    assert next(results).text in texts
    with pytest.raises(ValueError, match=r"absent.wav: no such audio file"):
        next(results)
    transcribe: Any = reader.transcribe
    for wrong, message in (
        (5, "not a recording"), ([0.5, 0.25], "not a recording"), (io.StringIO("x"), "as text"),
        (io.BytesIO(b""), "the file is empty"), (io.BytesIO(b"hello"), "not audio"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            list(transcribe(wrong))


def test_recordings_run_together_come_in_order_and_say_the_same(tiny_onnx, monkeypatch):
    """Long, short and silent ones; no more are read ahead than a batch needs."""
    reader = load(tiny_onnx, threads=1, min_confidence=0)
    recordings = [babble(seconds, seed=i) for i, seconds in enumerate((1.0, 30.0, 0.5, 2.0, 1.5))]
    recordings.insert(2, np.zeros(16000, np.float32))
    alone = [reader.transcribe(recording) for recording in recordings]
    sizes, taken = [], []
    run_backend = reader._backend.run

    def counted(features, lengths):
        sizes.append(len(lengths))
        return run_backend(features, lengths)

    def given():
        for number, recording in enumerate(recordings):
            taken.append(number)
            yield recording

    monkeypatch.setattr(reader._backend, "run", counted)
    results = reader.transcribe(given(), batch_size=3)
    together = [next(results)]
    assert taken == [0, 1]  # the second alone has pieces for the rest of a batch
    together += results
    assert max(sizes) == 3
    assert [r.text for r in together] == [r.text for r in alone]
    assert len({r.text for r in together}) >= 5
    starts = [[w.start for w in r.words] for r in together]
    assert starts == [[pytest.approx(w.start, abs=0.05) for w in r.words] for r in alone]


def test_another_sample_rate_and_stereo_are_fine(tiny_onnx, tmp_path, capsys):
    stereo = np.stack([babble(1.0), babble(1.0)], axis=1)
    soundfile.write(tmp_path / "a.wav", np.repeat(stereo, 3, axis=0), 48000)
    assert run(tiny_onnx, "--audio_path", tmp_path / "a.wav") == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("level", [0, SILENCE / 2], ids=["zeros", "faint"])
def test_silence_gives_an_empty_text(tiny_onnx, tmp_path, capsys, level):
    noise = np.random.default_rng(0).uniform(-level, level, 32000)
    soundfile.write(tmp_path / "a.wav", noise, 16000, subtype="FLOAT")
    assert run(tiny_onnx, "--audio_path", tmp_path / "a.wav") == 0
    assert capsys.readouterr().out == "\n"


def bad_audio(folder: Path) -> dict[str, Path]:
    samples = babble(1.0)
    paths = {name: folder / f"{name}.wav" for name in ("empty", "text", "nan", "short", "cut")}
    paths["empty"].write_bytes(b"")
    paths["text"].write_text("hello")
    soundfile.write(paths["nan"], np.where(samples > 0.3, np.nan, samples), 16000, subtype="FLOAT")
    soundfile.write(paths["short"], samples[: UNIT - 1], 16000)
    soundfile.write(paths["cut"], samples, 16000)
    paths["cut"].write_bytes(paths["cut"].read_bytes()[:9000])
    return {**paths, "absent": folder / "absent.wav"}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "empty"), ("text", "not audio"), ("nan", "NaN"),
        ("short", "shorter than one output frame"), ("absent", "no such audio file"),
    ],
)  # fmt: skip
def test_bad_audio_gives_one_line_and_keeps_the_old_text(
    tiny_onnx, tmp_path, capsys, kind, message
):
    path, target = bad_audio(tmp_path)[kind], tmp_path / "text.txt"
    target.write_text("old")
    assert run(tiny_onnx, "--audio_path", path, "--output_text", target) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert str(path) in line
    assert target.read_text() == "old"


def test_what_is_there_of_a_cut_file_is_written(tiny_onnx, tmp_path, capsys):
    path = tmp_path / "cut.wav"
    soundfile.write(path, babble(3.0), 16000)
    path.write_bytes(path.read_bytes()[:64000])
    assert run(tiny_onnx, path) == 2
    out, err = capsys.readouterr()
    assert out.strip()
    (line,) = err.splitlines()
    assert line.startswith(f"warning: {path}: truncated (")


def test_channels_are_heard_apart(tiny_onnx, tmp_path, capsys):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([babble(2.0), np.zeros(32000)], axis=1), 16000)
    texts = {}
    for name in ("left", "right", "2"):
        assert run(tiny_onnx, path, "--channel", name) == 0
        texts[name] = capsys.readouterr().out
    assert texts["left"].strip()
    assert texts["right"] == texts["2"] == "\n"
    assert run(tiny_onnx, path, "--channel", "each") == 0
    name = tmp_path / "a.channel"
    expected = f"{name}1.wav\t{texts['left']}{name}2.wav\t\n"
    assert capsys.readouterr().out == expected
    assert run(tiny_onnx, path, "--channel", "3") == 2
    assert "has no channel 3, only 2" in capsys.readouterr().err
    assert run(tiny_onnx, path, "--channel", "0") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_odd_names_are_shown_escaped(tiny_onnx, tmp_path, capsys):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\t.wav")
    soundfile.write(os.fsencode(path), babble(1.0), 16000, format="WAV")
    assert run(tiny_onnx, tmp_path) == 0
    name, text = capsys.readouterr().out.rstrip("\n").split("\t")
    assert name == f"{tmp_path}/caf\\xe9\\t.wav"
    assert text.strip()


def test_without_the_detector_silence_is_read(tiny_onnx, tmp_path, capsys):
    faint = np.random.default_rng(0).uniform(-0.01, 0.01, 5 * 16000)
    soundfile.write(tmp_path / "a.wav", faint, 16000)
    for flags, heard in (((), False), (("--no_vad",), True)):
        assert run(tiny_onnx, tmp_path / "a.wav", "--min_confidence", "0", *flags) == 0
        assert bool(capsys.readouterr().out.strip()) == heard


def test_bad_models_give_one_line(tiny_onnx, tiny_checkpoint, clip, tmp_path, capsys):
    contents = tiny_onnx.read_bytes()
    foreign = onnx.load(tiny_onnx)
    del foreign.metadata_props[:]
    newer = onnx.load(tiny_onnx)
    (entry,) = [p for p in newer.metadata_props if p.key == "asr"]
    entry.value = entry.value.replace('"version": 1', '"version": 2')
    broken = onnx.load(tiny_onnx)
    (entry,) = [p for p in broken.metadata_props if p.key == "asr"]
    entry.value = entry.value[:50]
    expected = {
        "cut.onnx": (contents[: len(contents) // 2], "truncated or damaged"),
        "empty.onnx": (b"", "truncated or damaged"),
        "foreign.onnx": (foreign.SerializeToString(), "has no tokens.txt"),
        "newer.onnx": (newer.SerializeToString(), "newer version"),
        "broken.onnx": (broken.SerializeToString(), "unusable metadata"),
        "cut.pt": (tiny_checkpoint.read_bytes()[:5000], "unreadable as a checkpoint"),
        "model.bin": (contents, "expected a model that ends in .onnx or .pt"),
    }
    for name, (data, message) in expected.items():
        (tmp_path / name).write_bytes(data)
        assert run(tmp_path / name, "--audio_path", clip) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert name in line
    for path, message in ((tmp_path, "a folder"), (tmp_path / "a.onnx", "no such model")):
        assert run(path, "--audio_path", clip) == 2
        assert message in capsys.readouterr().err


def test_a_model_for_a_newer_onnxruntime_says_so(tiny_onnx, clip, tmp_path, capsys):
    model = onnx.load(tiny_onnx)
    model.ir_version = 99
    onnx.save(model, tmp_path / "model.onnx")
    assert run(tmp_path / "model.onnx", "--audio_path", clip) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"needs a newer onnxruntime than {onnxruntime.__version__}" in line
    assert "damaged" not in line


@pytest.mark.parametrize(
    "error",
    [
        "Unsupported model IR version: 12, max supported IR version: 10",
        "Current official support for domain ai.onnx is till opset 18.",
        "Fatal error: com.microsoft:MatMulNBits(-1) is not a registered function/op",
    ],
)
def test_an_old_onnxruntime_is_told_which_is_needed(error):
    said = explain(error, "1.15.1")
    assert said.startswith("needs onnxruntime 1.20 or newer, 1.15.1 is installed; pip install")
    assert explain(error, "1.20.0").startswith("needs a newer onnxruntime than 1.20.0")


def test_other_mistakes_are_named(tiny_onnx, clip, tmp_path, capsys):
    assert run(tiny_onnx, "--audio_path", tmp_path) == 2
    assert "no audio in this folder" in capsys.readouterr().err
    assert run(tiny_onnx, "--audio_path", clip, "--output_text", clip) == 2
    assert "is the audio itself" in capsys.readouterr().err
    assert run(tiny_onnx, clip, clip, "--output_path", f"{tmp_path}/") == 2
    assert "two recordings have this name" in capsys.readouterr().err
    assert run(tiny_onnx, "--threads", "2") == 2
    assert "name audio files or folders" in capsys.readouterr().err
    assert run(tiny_onnx, clip, "--min_confidence", "3") == 2
    assert "min_confidence 3.0 must lie in [0, 1]" in capsys.readouterr().err
    assert run(tiny_onnx, clip, clip, "--output_format", "srt") == 2
    assert "name a folder for several" in capsys.readouterr().err
    assert run(tiny_onnx, "--audio_path", clip, "--threads", "-1") == 2
    assert "--threads -1" in capsys.readouterr().err


def test_the_default_model_is_the_one_that_ships(tiny_onnx, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shipped, "MODEL", tiny_onnx)
    assert main([str(clip), "--min_confidence", "0"]) == 0
    assert capsys.readouterr().out == load(min_confidence=0).transcribe(clip).text + "\n" != "\n"
    monkeypatch.setattr(shipped, "MODEL", tmp_path / "english.onnx")
    assert main([str(clip)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the English model is missing here" in line
    assert str(tmp_path / "english.onnx") in line


def test_python_reads_as_the_command_does(capsys):
    """The English model comes with its language model in both, and without it where told so."""
    audio = ROOT / "data" / "mini" / "test" / "af_bella" / "0000.opus"
    for flags, beam in ([], None), (["--lm", "none"], False):
        recognizer = asr.load(threads=1, beam=beam)
        assert (recognizer.decoder is greedy_decode) is (beam is False)
        assert main([str(audio), "--threads", "1", *flags]) == 0
        assert capsys.readouterr().out == recognizer.transcribe(audio).text + "\n" != "\n"


def test_a_full_disk_keeps_the_old_text(tiny_onnx, clip, tmp_path, capsys):
    target = tmp_path / "text.txt"
    target.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, before[1]))
    try:
        code = run(tiny_onnx, "--audio_path", clip, "--output_text", target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


# ---- the recogniser -------------------------------------------------------------------------


def test_a_waveform_reads_like_its_file(tiny_onnx, clip):
    reader = load(tiny_onnx, threads=1, min_confidence=0)
    samples, rate = soundfile.read(clip, dtype="int16")
    assert reader.transcribe(samples, rate) == reader.transcribe(clip)
    with pytest.raises(ValueError, match=r"the waveform: 0\.020 s"):
        reader.transcribe(np.ones(320))


def test_no_features_give_no_log_probs(tiny_onnx):
    assert load(tiny_onnx, threads=1, min_confidence=0).log_probs([]) == []


class Ear:
    """A backend that hears bursts: token 2 where the energy of a frame is above the mean."""

    info = Info(
        parameters=0, tokens=Tokenizer.characters().tokens, features=FeatureConfig(),
        subsampling_factor=4, one_at_a_time=False,
    )  # fmt: skip

    def __init__(self):
        self.longest = 0

    def run(self, features, lengths):
        self.longest = max(self.longest, features.shape[1])
        loud = features[:, ::4].mean(axis=2) > 0  # (B, T')
        log_probs = np.full((*loud.shape, len(self.info.tokens)), -9.0, np.float32)
        log_probs[..., 0] = np.where(loud, -9, 0)
        log_probs[..., 2] = np.where(loud, 0, -9)
        return log_probs


@pytest.mark.parametrize("seconds", [10.0, 24.99, 25.0, 25.02, 46.3, 200.0])
def test_no_word_is_lost_or_doubled_between_windows(seconds):
    """Bursts of 0.3 s after pauses of 0.2 to 2 s, as many in the text as in the audio."""
    random = np.random.default_rng(int(seconds))
    waveform = 0.001 * random.standard_normal(int(seconds * 16000)).astype(np.float32)
    at, count = 0.5, 0
    while at + 0.5 < seconds:
        here = slice(int(at * 16000), int(at * 16000) + 4800)
        waveform[here] *= 300
        at, count = at + 0.3 + random.uniform(0.2, 2), count + 1
    ear = Ear()
    assert Recognizer(ear).transcribe(waveform).text.replace(" ", "") == "'" * count
    log_probs = Recognizer(ear).waveform_log_probs(waveform)  # without the detector
    assert len(log_probs) == len(waveform) // 160 // 4 + 1
    assert Recognizer(ear).decode(log_probs) == "'" * count
    assert ear.longest <= pieces.WINDOW * 100 + 1


def test_a_silent_stretch_of_a_long_recording_is_not_amplified():
    waveform = np.zeros(90 * 16000, np.float32)
    waveform[16000:20800] = 0.3 * np.sin(np.arange(4800) * 0.3)
    assert Recognizer(Ear()).transcribe(waveform).text == "'"


def test_windows_change_a_long_reading_little(tiny_onnx, monkeypatch):
    reader, waveform = load(tiny_onnx, threads=1, min_confidence=0), babble(40.0)
    in_windows = reader.waveform_log_probs(waveform)
    monkeypatch.setattr(pieces, "WINDOW", 60.0)
    whole = reader.waveform_log_probs(waveform)
    assert in_windows.shape == whole.shape
    assert np.mean(in_windows.argmax(1) == whole.argmax(1)) > 0.9
    assert abs(in_windows - whole).mean() < 0.1


def test_windows_meet_at_a_blank_near_the_middle():
    readings = np.zeros((2, 9, 2))
    readings[:, :, 1] = 1
    assert meeting_frame(readings[0], readings[1]) == 4
    readings[:, [1, 6], 0] = 2
    readings[0, 5, 0] = 2  # a blank on one side only
    assert meeting_frame(readings[0], readings[1]) == 6
