"""English words from phonemes: the recogniser of `hama`, a lexicon and a language model."""

from __future__ import annotations

import json
from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from asr.corpus.lexicon import ENGLISH, Pronunciations, phonemes
from asr.corpus.units import BOUNDARY
from asr.importing.hama import Teacher
from asr.runtime.beam import BeamConfig, BeamSearch
from asr.runtime.language_model import LAST, WordModel
from asr.runtime.tokenizer import SPACE

LETTERS = 0x100  # phonemes are written as the characters from here on
NEVER = -1000.0  # what is no word

Floats = npt.NDArray[np.float32]


class Ears:
    """The phoneme recogniser, of the phonemes of a lexicon: the blank, BOUNDARY, then `names`.

    Natural logarithms: no phoneme is less likely than `unheard` in a frame; a boundary may stand
    `anywhere` at this price, and be left out where it is heard.
    """

    def __init__(
        self, path: str, lexicon: Pronunciations, unheard: float = -12.0, anywhere: float = -6.0
    ) -> None:
        self.teacher, self.unheard, self.anywhere = Teacher(path), unheard, anywhere
        vocabulary = Path(path).with_name("g2p_vocab.json")
        if not vocabulary.exists():
            raise ValueError(
                f"{vocabulary}: is missing; it lies beside the .hama file in the wheel"
            )
        symbols = json.loads(vocabulary.read_text(encoding="utf-8"))["decoder"]
        symbols += ["<wb>", "<blank>"]
        self.names = phonemes(lexicon, symbols)
        alike = {name: [a for a, b in ENGLISH.items() if b == name] for name in self.names}
        groups = [["<blank>"], ["<wb>"], *([name, *alike[name]] for name in self.names)]
        self.columns = [[symbols.index(s) for s in group if s in symbols] for group in groups]

    @torch.no_grad()
    def __call__(self, waveform: Floats) -> Floats:
        """Log-probabilities (T, 2 + names) of a waveform (N,) at 16 kHz, 50 frames a second."""
        level = 0.1 / max(float(waveform.std()), 1e-4)  # that at which it hears best
        heard = torch.from_numpy(waveform * np.float32(level))[None]
        hidden, _ = self.teacher(heard, torch.tensor([len(waveform)]))
        symbols = self.teacher.symbols(hidden)[0]  # (T, 191)
        found = torch.stack([symbols[:, columns].logsumexp(1) for columns in self.columns], 1)
        found.clamp_(min=self.unheard)
        between = found.argmax(1) == BOUNDARY
        found[:, BOUNDARY].clamp_(min=self.anywhere)
        found[between, 0] = found[between, 0].clamp(min=self.anywhere)
        return found.log_softmax(1).numpy()


class SpelledWords:
    """A language model whose words are spelled by phonemes: see `asr.runtime.beam.WordScorer`.

    Of words that sound alike, the likeliest after those before it is meant.
    """

    def __init__(self, lexicon: Pronunciations, names: list[str], config: BeamConfig) -> None:
        self.model = WordModel(config.lm, config)
        letters = {name: chr(LETTERS + number) for number, name in enumerate(names)}
        self.letters = [SPACE, *letters.values()]
        alike: dict[str, list[str]] = {}
        for word, spoken in lexicon.items():
            if all(phone in letters for phone in spoken):
                alike.setdefault("".join(letters[phone] for phone in spoken), []).append(word)
        self.alike, self.spelled = alike, sorted(alike)
        likely = {word: self.model.score((), word)[0] for word in lexicon}  # in no context
        self.best = np.array([max(likely[word] for word in alike[s]) for s in self.spelled])
        self.seen: dict[str, float] = {}

    def start(self) -> Any:
        return self.model.start()

    def score(self, state: Any, spelled: str) -> tuple[float, Any]:
        score, after, _ = self.meant(state, spelled)
        return score, after

    def end(self, state: Any) -> float:
        return self.model.end(state)

    def ahead(self, prefix: str) -> float:
        best = self.seen.get(prefix)
        if best is None:
            first = bisect_left(self.spelled, prefix)
            last = bisect_left(self.spelled, prefix + LAST, first)
            best = float(self.best[first:last].max()) if first < last else NEVER
            self.seen[prefix] = best
        return best

    def meant(self, state: Any, spelled: str) -> tuple[float, Any, str]:
        """The likeliest word of this sound, what it adds, and the state after it."""
        words = self.alike.get(spelled)
        if not words:
            return NEVER, state, ""
        scores = ((*self.model.score(state, word), word) for word in words)
        return max(scores, key=lambda found: found[0])

    def text(self, spelled: str) -> str:
        """The words of a hypothesis."""
        state, words = self.start(), []
        for part in filter(None, spelled.split(SPACE)):
            _, state, word = self.meant(state, part)
            words.append(word)
        return " ".join(filter(None, words))


class PhonemeRecogniser:
    """Waveforms (N,) at 16 kHz to text."""

    def __init__(self, path: str, lexicon: Pronunciations, config: BeamConfig) -> None:
        self.ears = Ears(path, lexicon)
        self.words = SpelledWords(lexicon, self.ears.names, config)
        self.tokens = ["<blank>", *self.words.letters]
        self.search = BeamSearch(self.tokens, config, self.words)

    def __call__(self, waveform: Floats) -> str:
        ids = self.search(self.ears(waveform))
        return self.words.text("".join(self.tokens[i] for i in ids))
