"""Cutting recordings in pauses: every sample of speech is in a piece, long or short, once."""

from itertools import pairwise

import numpy as np
import pytest

from asr.runtime.pieces import OVERLAP, PAD, WINDOW, Cutter, cut_in_pauses
from asr.runtime.vad import find_speech

RATE = 16000
FRAME = RATE // 100
UNIT = 640


def recording(seconds, bursts, level=0.3, noise=1e-4, seed=0):
    """Noise (N,) with louder noise, that swells as syllables do, in `bursts` of (start, stop) s."""
    random = np.random.default_rng(seed)
    waveform = random.standard_normal(int(seconds * RATE)) * noise
    swell = 0.6 - 0.4 * np.cos(2 * np.pi * 5 * np.arange(len(waveform)) / RATE)
    for start, stop in bursts:
        here = slice(int(start * RATE), int(stop * RATE))
        waveform[here] += level * swell[here] * random.standard_normal(len(waveform[here]))
    return waveform.astype(np.float32)


def in_blocks(waveform, size):
    return (waveform[at : at + size] for at in range(0, len(waveform), size))


def cut(waveform, detector=find_speech, block=50_000):
    found = list(cut_in_pauses(in_blocks(waveform, block), RATE, detector, UNIT))
    for piece in found:
        there = waveform[piece.start : piece.start + len(piece.waveform)]
        np.testing.assert_array_equal(piece.waveform, there)
        assert 0 < len(piece.waveform) <= WINDOW * RATE
    for one, other in pairwise(found):
        assert one.start + len(one.waveform) - other.overlap <= other.start
    return found


def spans(found):
    return [(s.start / RATE, (s.start + len(s.waveform)) / RATE) for s in found]


def test_short_silences_stay_and_long_ones_go():
    assert spans(cut(recording(4, [(0.9, 2), (2.9, 3.1)]))) == [(0, 4)]
    found = spans(cut(recording(20, [(5, 7), (9.5, 11)])))
    assert found == [(4.4, 7.6), (8.8, 11.6)]  # a pad of 0.3 s, on to multiples of 0.4 s


@pytest.mark.parametrize(
    "bursts", [[(5, 7), (9.5, 11), (12.1, 13)], [(1.2, 12), (12.2, 19), (19.4, 37.5)]]
)
def test_doubtful_frames_move_no_border(bursts):
    def surer(levels):
        mask = find_speech(levels)
        return mask | np.roll(mask, -3) | np.roll(mask, 2)

    waveform = recording(40, bursts)
    assert spans(cut(waveform, surer)) == spans(cut(waveform))


@pytest.mark.parametrize("level", [1e-3, 1.0])
def test_the_level_does_not_matter(level):
    waveform = recording(20, [(5, 7), (9.5, 11)])
    assert spans(cut(level * waveform)) == spans(cut(waveform))


def test_silence_and_clicks_are_no_speech():
    assert cut(np.zeros(5 * RATE, np.float32)) == []
    assert cut(recording(70, [])) == []
    clicks = recording(20, [(5, 7)])
    clicks[[12 * RATE, 16 * RATE]] = 1
    assert len(cut(clicks)) == 1


@pytest.mark.parametrize("seconds", [0.15, 0.2, 0.4, 0.9])
def test_a_short_recording_is_not_lost(seconds):
    (piece,) = cut(recording(seconds, [(0, seconds)]))
    assert len(piece.waveform) == int(seconds * RATE)


def test_a_long_speech_is_cut_in_its_longest_pause():
    bursts = [(1, 12), (12.15, 19), (19.4, 24), (24.2, 33)]
    (first, second) = cut(recording(34, bursts))
    assert first.start + len(first.waveform) == second.start == pytest.approx(19.2 * RATE, rel=0.01)
    assert second.overlap == 0


@pytest.mark.parametrize("detector", [find_speech, None])
@pytest.mark.parametrize("seconds", [25.01, 46.3, 61, 200])
def test_speech_without_a_pause_is_cut_in_overlapping_windows(detector, seconds):
    waveform = recording(seconds + 5, [(0, seconds)])[: int(seconds * RATE)]
    if detector is not None:  # a silence that tells what is quiet
        waveform = np.concatenate([waveform, recording(5, [])])
    found = cut(waveform, detector)
    assert found[0].start == 0
    assert found[-1].start + len(found[-1].waveform) >= seconds * RATE
    assert found[0].overlap == 0
    for one, other in pairwise(found):
        assert other.overlap == one.start + len(one.waveform) - other.start >= OVERLAP * RATE - UNIT
        assert (other.start - one.start) % UNIT == 0
    assert min(len(s.waveform) for s in found) > 2 * OVERLAP * RATE


def test_blocks_of_any_size_give_the_same_pieces():
    random = np.random.default_rng(1)
    edges = np.cumsum(random.uniform(0.2, 6, 120))
    waveform = recording(edges[-1] + 3, edges.reshape(-1, 2))
    expected = cut(waveform, block=len(waveform))
    assert len(expected) > 20
    assert all(spans(cut(waveform, block=n)) == spans(expected) for n in (1000, 480_000, 480_001))
    inside = np.zeros(len(waveform), bool)
    for piece in expected:
        inside[piece.start : piece.start + len(piece.waveform)] = True
    for start, stop in edges.reshape(-1, 2):
        assert inside[int(start * RATE) : int(stop * RATE)].all()


@pytest.mark.parametrize("seed", range(3))
def test_what_follows_changes_no_piece(seed):
    """So that live sound is cut as its file is."""
    random = np.random.default_rng(seed)
    edges = np.cumsum(random.uniform(0.2, 4, 60))
    waveform = recording(edges[-1] + 3, edges.reshape(-1, 2), level=0.01)
    waveform[len(waveform) // 2 :] *= random.choice([0.03, 30])
    cutter, found = Cutter(RATE, UNIT, find_speech), []
    for block in in_blocks(waveform, 1600):
        cutter.add(block)
        while piece := cutter.take():
            found.append(piece)
        assert len(cutter.waveform) < 32 * RATE
    expected = spans(cut(waveform))
    assert len(found) > 10
    assert spans(found) == expected[: len(found)]
    assert len(expected) - len(found) <= 1


def test_pieces_come_before_the_recording_ends():
    heard = 0

    def blocks():
        nonlocal heard
        for block in in_blocks(recording(300, [(at, at + 3) for at in range(2, 298, 6)]), RATE):
            heard += len(block)
            yield block

    for piece in cut_in_pauses(blocks(), RATE, find_speech):
        assert heard - piece.start <= 40 * RATE


def test_a_pad_stays_on_either_side():
    (piece,) = cut(recording(20, [(10, 12)]))
    assert piece.start <= 10 * RATE - (PAD - 4) * FRAME
    assert piece.start + len(piece.waveform) >= 12 * RATE + (PAD - 4) * FRAME
