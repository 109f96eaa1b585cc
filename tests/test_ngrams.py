"""Compiled n-gram models against the definition of back-off, and against kenlm's."""

import gzip
import random

import numpy as np
import pytest

from asr.corpus.ngram import estimate, write_arpa
from asr.runtime.arpa import NgramModel, read_arpa
from asr.runtime.ngrams import Ngrams, compile_model, load_ngrams
from scripts import build_lm
from tests.arpa import Arpa

WORDS = "one two three four five six seven eight Ünder naïve".split()


def random_text(seed: int, sentences: int = 200) -> list[list[str]]:
    rng = random.Random(seed)
    return [
        [WORDS[int(rng.paretovariate(0.7)) % len(WORDS)] for _ in range(rng.randrange(1, 9))]
        for _ in range(sentences)
    ]


def sentences(seed: int) -> list[list[str]]:
    """Texts to score: words seen, words unknown, and nothing."""
    return [[], ["never"], ["never", "one"], *random_text(seed, 30), ["two", "unknown", "one"] * 2]


def score(model: Ngrams, words: list[str]) -> list[float]:
    """The score of each word and of the end."""
    state, found = model.start(), []
    for word in words:
        number = model.find(word)
        log, state = model.score(state, model.unknown if number < 0 else number)
        found.append(log)
    return [*found, model.end(state)]


def expected(arpa: Arpa, words: list[str]) -> list[float]:
    text = ["<s>", *words, "</s>"]
    return [arpa.log10(word, tuple(text[: i + 1])) for i, word in enumerate(text[1:])]


SHAPES = [(1, []), (2, []), (3, [0, 0, 1]), (4, [0, 1, 1, 2]), (5, [])]


@pytest.fixture(params=SHAPES, ids=lambda shape: str(shape[0]))
def arpa_path(request, tmp_path):
    path = tmp_path / "lm.arpa"
    write_arpa(path, estimate(random_text(1), *request.param))
    return path


def test_scores_follow_the_definition(arpa_path):
    model, arpa = Ngrams(compile_model(read_arpa(arpa_path), exact=True)), Arpa(arpa_path)
    for words in sentences(2):
        assert score(model, words) == pytest.approx(expected(arpa, words), abs=1e-5)


def test_scores_are_those_of_kenlm(arpa_path):
    kenlm = pytest.importorskip("kenlm", reason="kenlm, a reference, is not installed")
    if Arpa(arpa_path).order == 1:
        pytest.skip("kenlm reads no model of order 1")
    model, theirs = (
        Ngrams(compile_model(read_arpa(arpa_path), exact=True)),
        kenlm.Model(str(arpa_path)),
    )
    for words in sentences(3):
        logs = [log for log, _, _ in theirs.full_scores(" ".join(words))]
        assert score(model, words) == pytest.approx(logs, abs=1e-4)


def test_a_codebook_is_near(tmp_path):
    """More values than a codebook holds; those of a small model are kept as they are."""
    rng = np.random.default_rng(0)
    count = 3000
    logs = np.append(-rng.gamma(4, 1, count), [-99.0, -2.0, -3.0])
    model = NgramModel([f"w{i}" for i in range(count)] + ["<s>", "</s>", "<unk>"], [])
    backoffs = rng.normal(-0.3, 0.2, len(logs))
    model.orders.append((np.arange(len(logs))[:, None], logs, backoffs))
    pairs = rng.integers(0, count, (count, 2))
    pairs = np.unique(pairs, axis=0)
    model.orders.append((pairs, -rng.gamma(2, 1, len(pairs)), np.zeros(len(pairs))))
    exact, coded = (Ngrams(compile_model(model, exact)) for exact in (True, False))
    errors = []
    for a, b in pairs.tolist():
        scores = []
        for compiled in (exact, coded):
            first, state = compiled.score((), compiled.find(f"w{a}"))
            scores.append([first, compiled.score(state, compiled.find(f"w{b}"))[0]])
        errors += [abs(a - b) for a, b in zip(*scores, strict=True)]
    assert 0 < np.mean(errors) < 0.02
    assert np.max(errors) < 0.5
    assert len(compile_model(model)) < 0.6 * len(compile_model(model, exact=True))


def test_states_are_equal_where_the_future_is(arpa_path):
    """Long pasts that end alike, or in a word that begins no n-gram, are one state."""
    model, arpa = Ngrams(compile_model(read_arpa(arpa_path))), Arpa(arpa_path)

    def after(text):
        state = model.start()
        for word in text.split():
            number = model.find(word)
            state = model.score(state, model.unknown if number < 0 else number)[1]
        return state

    last = " ".join(["two"] * (arpa.order - 1))
    assert after(f"one five {last}") == after(f"six {last}")
    assert after("one two unknown") == after("three unknown") == ()
    assert len(after("two two two two two")) == arpa.order - 1


def test_a_large_vocabulary_needs_wider_numbers():
    count = 66_000
    words = [*(f"w{i:05}" for i in range(count)), "<s>", "</s>", "<unk>"]
    single = np.arange(len(words))[:, None], np.full(len(words), -5.0), np.full(len(words), -0.25)
    pairs = np.column_stack([np.arange(count), np.arange(count)[::-1]])
    double = pairs, -np.arange(count) / count, np.zeros(count)
    model = Ngrams(compile_model(NgramModel(words, [single, double]), exact=True))
    for i in (0, 255, 256, 40_000, count - 1):
        state = model.score((), i + 3)[1]  # the three signs come first in the alphabet
        assert model.words[i + 3] == words[i]
        assert model.score(state, count - 1 - i + 3)[0] == pytest.approx(-i / count, abs=1e-6)
        assert model.score(state, (count - i) % count + 3)[0] == -5.25


# ---- files ------------------------------------------------------------------------------------


def test_a_file_is_mapped_and_gives_the_same(arpa_path, tmp_path):
    data = compile_model(read_arpa(arpa_path))
    (tmp_path / "a.lm").write_bytes(data)
    mapped, model = load_ngrams(tmp_path / "a.lm"), Ngrams(data)
    for words in sentences(4):
        assert score(mapped, words) == score(model, words)


@pytest.mark.parametrize("end", [0, 1, 7, 8, 11, 12, 40, -700, -8, -1])
def test_a_file_cut_off_is_named(arpa_path, tmp_path, end):
    (tmp_path / "a.lm").write_bytes(compile_model(read_arpa(arpa_path))[:end])
    with pytest.raises(ValueError, match=r"a.lm: not a usable compiled language model") as raised:
        load_ngrams(tmp_path / "a.lm")
    assert "\n" not in str(raised.value)


ARPA = """\\data\\
ngram 1=4
ngram 2=1

\\1-grams:
-1.0\t<s>\t-0.5
-1.5\t</s>
-0.5\ta\t-0.25
-0.75\tb

\\2-grams:
-0.125\t<s> a

\\end\\
"""


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_an_arpa_file_as_others_write_it(pack, tmp_path):
    """Back-offs of some n-grams only, spaces for tabs, a comment before, no unknown word."""
    path = tmp_path / "lm.arpa"
    text = ARPA.replace("\t", "  ", 2).replace("\n", "\r\n")
    path.write_bytes(pack(text.encode()))
    model = Ngrams(compile_model(read_arpa(path), exact=True))
    assert score(model, ["a", "b"]) == pytest.approx([-0.125, -0.75 - 0.25, -1.5])
    assert score(model, ["never"]) == pytest.approx([-100 - 0.5, -1.5])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ngram 1=4", "ngram 1=5", "expected 5 1-grams and found"),
        ("ngram 1=4", "ngram 1=3", r"expected .2-grams: and found -0.75\\tb"),
        ("ngram 2=1", "ngram 3=1", "expected ngram 2=… and found ngram 3=1"),
        ("ngram 1=4", "ngram 1=x", "found ngram 1=x"),
        ("ngram 1=4\nngram 2=1\n", "", "lists no words"),
        ("\\end\\\n", "", "found its end"),
        ("<s> a", "<s> c", "c is not among the 1-grams"),
        ("<s> a", "<s>", "expected 1 2-grams and found"),
        ("<s> a", "<s> a -1 -2", "expected 1 2-grams and found"),
        ("\tb", "\ta", "stands twice among the 1-grams"),
        ("-0.125", "0.125", "a log probability of the 2-grams is none"),
        ("-0.125", "nan", "a log probability of the 2-grams is none"),
        ("-0.125", "x", "could not convert"),
        ("-0.25", "-inf", "a log probability of the 1-grams is none"),
        ("<s>", "s", "<s> is missing among the 1-grams"),
        ("b", "\udce9", "not UTF-8 text; convert it"),
    ],
)
def test_a_wrong_arpa_file_is_explained(old, new, message, tmp_path):
    path = tmp_path / "lm.arpa"
    path.write_bytes(ARPA.replace(old, new).encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"lm.arpa: .*{message}") as raised:
        read_arpa(path)
    assert "\n" not in str(raised.value)


def test_a_packed_file_cut_off_is_named(tmp_path):
    path = tmp_path / "lm.arpa.gz"
    path.write_bytes(gzip.compress(ARPA.encode())[:-20])
    with pytest.raises(ValueError, match=r"lm.arpa.gz: not a usable"):
        read_arpa(path)


@pytest.mark.parametrize(
    ("pair", "message"), [("a b c", "'a b c' without 'a b'"), ("<s> a", "stands twice")]
)
def test_a_model_with_gaps_is_refused(pair, message, tmp_path):
    orders = len(pair.split())
    more = f"\\{orders}-grams:\n-0.5\t{pair}\n"
    text = ARPA.replace("-0.75\tb", "-0.75\tb\n-0.75\tc").replace("1=4", "1=5")
    if orders == 3:
        text = text.replace("2=1\n", "2=1\nngram 3=1\n").replace("\\end", f"{more}\n\\end")
    else:
        text = text.replace("2=1", "2=2").replace("<s> a\n", f"<s> a\n-0.5\t{pair}\n")
    (tmp_path / "lm.arpa").write_text(text)
    with pytest.raises(ValueError, match=message):
        compile_model(read_arpa(tmp_path / "lm.arpa"))


def test_build_lm_compiles_a_text_or_an_arpa_file(tmp_path, capsys):
    text, arpa = tmp_path / "text.txt", tmp_path / "lm.arpa"
    text.write_text("\n".join(" ".join(words) for words in random_text(5)), encoding="utf-8")
    for source, output in ((f"--text {text}", "lm.arpa"), (f"--text {text}", "a.lm"),
                           (f"--arpa {arpa}", "b.lm")):  # fmt: skip
        assert build_lm.main([*source.split(), "--output_path", str(tmp_path / output)]) == 0
    models = [load_ngrams(tmp_path / name) for name in ("a.lm", "b.lm")]
    for words in (["one", "two"], ["never", "three"]):
        want = expected(Arpa(arpa), words)
        assert [score(model, words) for model in models] == [pytest.approx(want, abs=1e-2)] * 2
    capsys.readouterr()
    arpa.write_text("no model\n")
    assert build_lm.main(["--arpa", str(arpa), "--output_path", str(tmp_path / "c.lm")]) == 2
    error = capsys.readouterr().err
    assert "lm.arpa: not a usable ARPA language model" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "c.lm").exists()
