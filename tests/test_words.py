"""Words with times and confidence: the alignment, the borders beside pauses, real speech."""

import os
from itertools import pairwise, product
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile

from asr.corpus.splits import read_source
from asr.measure.evaluation import spread
from asr.runtime import words as words_module
from asr.runtime.audio import read_audio
from asr.runtime.decoding import greedy_decode
from asr.runtime.pauses import settle
from asr.runtime.pieces import WINDOW
from asr.runtime.recognizer import load
from asr.runtime.result import PAUSE, Result, split_at_pauses
from asr.runtime.tokenizer import Tokenizer
from asr.runtime.vad import find_speech
from asr.runtime.words import Word, align, read_words
from tests.conftest import babble

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "experiments" / "librispeech" / "model_int8.onnx"
RATE = 16000
LETTERS = Tokenizer.characters("abc").tokens  # blank, space, a, b, c


def random_log_probs(n_frames, n_tokens, seed):
    scores = np.random.default_rng(seed).normal(0, 2, (n_frames, n_tokens))
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def collapse(path):
    return [b for a, b in pairwise([0, *path]) if b not in (a, 0)]


# ---- alignment ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_the_alignment_is_the_best_of_all_paths(seed):
    """Every path of 7 frames over a blank and two tokens is tried."""
    log_probs = random_log_probs(7, 3, seed)
    ids = [[1], [1, 1], [1, 2, 1], [2, 2, 1, 2], []][seed % 5]
    fitting = [p for p in product(range(3), repeat=7) if collapse(p) == ids]
    best = max(fitting, key=lambda p: sum(log_probs[t, i] for t, i in enumerate(p)))
    expected = np.zeros(7, int)
    for i, (first, stop) in zip(ids, align(log_probs, ids).tolist(), strict=True):
        expected[first:stop] = i
    assert expected.tolist() == list(best)


def test_a_greedy_reading_is_its_own_alignment():
    log_probs = random_log_probs(300, 5, seed=1)
    spans = align(log_probs, greedy_decode(log_probs))
    best = log_probs.argmax(axis=1)
    for first, stop in spans.tolist():
        assert len(set(best[first:stop].tolist())) == 1
    assert sum(stop - first for first, stop in spans.tolist()) == np.count_nonzero(best)


def test_a_band_changes_no_alignment_of_a_long_recording(monkeypatch):
    """With other tokens than the greedy ones, as a language model would have them."""
    log_probs = random_log_probs(900, 5, seed=2)
    ids = [i for n, i in enumerate(greedy_decode(log_probs)) if n % 7]
    banded = align(log_probs, ids)
    monkeypatch.setattr(words_module, "BAND", 10**6)
    assert banded.tolist() == align(log_probs, ids).tolist()
    assert len(ids) > 300


def test_tokens_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 tokens do not fit into 4 frames"):
        align(random_log_probs(4, 3, seed=0), [1, 1, 1])


# ---- words ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [LETTERS, ["<blk>", "▁", "▁a", "b", "▁ca"]], ids=["char", "bpe"])
@pytest.mark.parametrize("seed", range(5))
def test_words_are_those_of_the_text_and_in_order(tokens, seed):
    log_probs = random_log_probs(80, len(tokens), seed)
    ids = greedy_decode(log_probs)
    words = read_words(log_probs, ids, tokens, seconds=0.04)
    assert " ".join(w.text for w in words) == Tokenizer(tokens).decode(ids)
    assert all(a.end <= b.start for a, b in pairwise(words))
    assert all(0 <= w.start < w.end <= 80 * 0.04 for w in words)
    assert all(0 < w.confidence < 1 for w in words)


def test_confidence_falls_with_every_doubtful_token():
    log_probs = np.log(np.full((6, 5), 0.001))
    log_probs[range(6), [2, 0, 3, 1, 4, 0]] = np.log([0.9, 0.99, 0.5, 0.9, 0.8, 0.99])
    one, two = read_words(log_probs, [2, 3, 1, 4], LETTERS, seconds=0.04)
    assert (one.text, two.text) == ("ab", "c")
    assert one.confidence == pytest.approx(0.45**words_module.SOUNDED)
    assert two.confidence == pytest.approx(0.8**words_module.SOUNDED)
    assert (one.start, one.end) == pytest.approx((0.0, 0.12))
    one, two = read_words(log_probs, [2, 3, 1, 4], LETTERS, seconds=0.04, worded=True)
    assert one.confidence == pytest.approx(0.45 ** (words_module.WORDED / 2))
    assert two.confidence == pytest.approx(0.8**words_module.WORDED)
    assert read_words(log_probs, [], LETTERS, seconds=0.04) == []


# ---- borders beside pauses ------------------------------------------------------------------


def bursts(spans, seconds, noise, seed=0):
    """Tones in noise at `noise` dBFS."""
    waveform = 10 ** (noise / 20) * np.random.default_rng(seed).standard_normal(int(seconds * RATE))
    for start, end in spans:
        here = slice(int(start * RATE), int(end * RATE))
        waveform[here] += 0.3 * np.sin(np.arange(here.stop - here.start) * 0.1)
    return waveform.astype(np.float32)


@pytest.mark.parametrize("noise", [-90, -60, -35])
@pytest.mark.parametrize("shift", [-0.12, 0.0, 0.1])
def test_borders_move_to_where_the_sound_is(noise, shift):
    """Whether the model names words before or after they are heard, and in noise."""
    spans = [(0.5, 0.9), (0.95, 1.3), (2.0, 2.5), (3.3, 3.6)]
    named = [Word("a", a + 0.1 + shift, b - 0.1 + shift, 0.9) for a, b in spans]
    found = settle(named, bursts(spans, 4.0, noise), RATE)
    for i, (start, end) in enumerate(spans):
        assert i == 1 or found[i].start == pytest.approx(start, abs=0.021)
        assert i == 0 or found[i].end == pytest.approx(end, abs=0.021)
    assert found[0].end == found[1].start == pytest.approx(0.925 + shift, abs=0.1)


@pytest.mark.parametrize("seed", range(20))
def test_words_stay_in_order_and_inside_whatever_the_sound(seed):
    random = np.random.default_rng(seed)
    times = np.sort(random.uniform(0, 3.2, 16)).reshape(-1, 2).tolist()
    named = [Word(str(n), a, b, 0.5) for n, (a, b) in enumerate(times)]
    waveform = babble(3.0, seed) * (random.uniform(size=48000) > seed / 20)
    found = settle(named, waveform * np.float32(10 ** random.uniform(-6, 0)), RATE)
    flat = [t for w in found for t in (w.start, w.end)]
    assert flat == sorted(flat)
    assert 0 <= flat[0] <= flat[-1] <= 3.0
    assert [w.text for w in found] == [w.text for w in named]


def test_no_word_lasts_through_a_long_sound_that_is_no_speech():
    waveform = bursts([(0.5, 8.0)], 9.0, -60)  # no quiet between the words
    one, two = settle([Word("a", 0.5, 0.8, 1), Word("b", 7.0, 7.5, 1)], waveform, RATE)
    assert one.end < 1.5
    assert two.start > 6.0


# ---- results --------------------------------------------------------------------------------


def test_segments_end_at_pauses():
    words = [Word("a", 0, 0.2, 1), Word("b", 0.3, 0.6, 0.5), Word("c", 0.6 + PAUSE, 2, 0.9)]
    result = Result(tuple(split_at_pauses(words)))
    assert [s.text for s in result.segments] == ["a b", "c"]
    assert [(s.start, s.end) for s in result.segments] == [(0, 0.6), (0.6 + PAUSE, 2)]
    assert result.words == tuple(words)
    assert str(result) == result.text == "a b c"
    assert result.confidence == pytest.approx(0.8)
    assert Result().text == ""
    assert Result().confidence == 0.0


# ---- real speech ----------------------------------------------------------------------------


def without_edges(waveform):
    """A clean recording from its first to its last sound."""
    loud = np.flatnonzero(np.abs(waveform) > 0.02 * np.abs(waveform).max())
    return waveform[loud[0] : loud[-1] + 1]


@pytest.fixture(scope="module")
def with_known_pauses():
    """Thirty sentences of the built-in corpus with pauses of 0.3 to 2 s, five a recording."""
    random = np.random.default_rng(0)
    sentences = [read_audio(u.audio_filepath) for u in read_source(ROOT / "data/mini/test.json")]
    found = []
    for at in range(0, 30, 5):
        pieces, spans, now = [], [], 0
        for sentence in map(without_edges, sentences[at : at + 5]):
            pause = int(random.uniform(0.3, 2) * RATE)
            pieces += [np.zeros(pause, np.float32), sentence]
            spans.append(((now + pause) / RATE, (now + pause + len(sentence)) / RATE))
            now += pause + len(sentence)
        waveform = np.concatenate([*pieces, np.zeros(RATE, np.float32)])
        noise = 1e-3 * random.standard_normal(len(waveform))  # a quiet room
        found.append(((waveform + noise).astype(np.float32), spans))
    return found


def test_words_beside_pauses_are_where_they_are_heard(with_known_pauses):
    reader, off = load(MODEL, threads=1), []
    for waveform, spans in with_known_pauses:
        words = reader.transcribe(waveform).words
        for start, end in spans:
            inside = [w for w in words if start - 0.1 < (w.start + w.end) / 2 < end + 0.1]
            off += [abs(inside[0].start - start), abs(inside[-1].end - end)]
    assert len(off) == 60
    assert np.median(off) <= 0.06
    assert np.percentile(off, 95) <= 0.15


def test_times_never_run_backwards_across_windows():
    sentences = [read_audio(u.audio_filepath) for u in read_source(ROOT / "data/mini/dev.json")]
    waveform = np.concatenate(sentences[:16])
    result = load(MODEL, threads=1).transcribe(waveform)
    flat = [t for w in result.words for t in (w.start, w.end)]
    assert flat == sorted(flat)
    assert WINDOW < flat[-1] <= len(waveform) / RATE
    for segment in result.segments:
        assert all(segment.start <= w.start <= w.end <= segment.end for w in segment.words)


def test_sure_words_are_right():
    """Over words with confidence 0.9 and more, a third of the errors of all."""
    folder = Path(os.environ.get("ASR_CORPORA", ROOT / ".." / "shared")) / "LibriSpeech/dev-clean"
    if not folder.is_dir():
        pytest.skip("no real speech: ASR_CORPORA")
    reader, sure, right = load(MODEL, threads=1, min_confidence=0), [], []
    for utterance in spread(read_source(folder), 60):
        result = reader.transcribe(utterance.audio_filepath)
        alignment = jiwer.process_words(utterance.text, result.text).alignments[0]
        equal = {
            i for c in alignment if c.type == "equal" for i in range(c.hyp_start_idx, c.hyp_end_idx)
        }
        right += [i in equal for i in range(len(result.words))]
        sure += [w.confidence for w in result.words]
    wrong, sure = 1 - np.array(right), np.array(sure)
    assert np.mean(sure >= 0.9) > 0.3
    assert wrong[sure >= 0.9].mean() < wrong.mean() / 3
    assert np.mean(sure) == pytest.approx(1 - wrong.mean(), abs=0.1)


def noises(seconds):
    """White and pink noise, a fan, chords with a beat: what is no speech."""
    random, n = np.random.default_rng(0), int(seconds * RATE)
    time = np.arange(n) / RATE
    spectrum = np.fft.rfft(random.standard_normal(n))
    pink = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)), n)
    fan = pink / np.abs(pink).max() * (1 + 0.3 * np.sin(44 * time))
    fan += 0.1 * sum(np.sin(2 * np.pi * hertz * time) for hertz in (50, 100, 150, 340))
    music = np.zeros(n)
    for beat in range(int(2 * seconds)):
        note = time[: n - beat * RATE // 2]
        root = (220.0, 196.0, 174.6, 196.0)[beat // 4 % 4]
        for hertz in (root, 1.26 * root, 1.5 * root, (2, 3, 2.52)[beat % 3] * root):
            chord = sum(np.sin(2 * np.pi * h * hertz * note) / h for h in range(1, 6))
            music[beat * RATE // 2 :] += np.exp(-3 * note) * (1 - np.exp(-200 * note)) * chord
        music[beat * RATE // 2 :] += 2 * np.exp(-40 * note) * random.standard_normal(len(note))
    return {"white": random.standard_normal(n), "pink": pink, "fan": fan, "music": music}


@pytest.mark.parametrize("detector", [find_speech, None], ids=["vad", "no vad"])
def test_noise_and_music_say_nothing(detector):
    reader = load(MODEL, threads=1)
    reader.detector = detector
    for name, sound in noises(10.0).items():
        waveform = (0.5 * sound / np.abs(sound).max()).astype(np.float32)
        assert len(reader.transcribe(waveform).words) * 60 / 10 <= 2, name


def test_tokens_are_where_sherpa_has_them(tmp_path):
    sherpa_onnx = pytest.importorskip("sherpa_onnx", reason="pip install sherpa-onnx")
    theirs = sherpa_onnx.OfflineRecognizer.from_nemo_ctc(
        str(MODEL), str(MODEL.with_name("tokens.txt")), num_threads=1
    )
    ours, compared = load(MODEL, threads=1), 0
    for path in sorted((ROOT / "data/mini/test").rglob("*.opus"))[:6]:
        waveform, _ = soundfile.read(path, dtype="float32")
        stream = theirs.create_stream()
        stream.accept_waveform(RATE, np.pad(waveform, (80, 0)))  # half a hop: its frames are ours
        theirs.decode_stream(stream)
        log_probs = ours.waveform_log_probs(waveform)
        ids = greedy_decode(log_probs)
        if [ours.info.tokens[i].replace("▁", " ") for i in ids] != stream.result.tokens:
            continue
        starts = align(log_probs, ids)[:, 0]
        assert np.abs(starts - np.array(stream.result.timestamps) / 0.04).max() <= 2
        compared += len(ids)
    assert compared > 50
