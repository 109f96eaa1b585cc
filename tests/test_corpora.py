"""Several corpora in training: weights by name, dev sets that count alike, corpora by manifest."""

from __future__ import annotations

import pytest

from asr.common.metrics import error_rates
from asr.corpus.manifest import read_manifest, write_manifest
from asr.corpus.splits import load_splits
from asr.training.dev import Heard
from asr.training.epochs import full_names
from asr.training.train_config import TrainConfig
from tests.corpus import write_corpus


def heard(**texts):
    """A model's answers by set: pairs of what was said and heard."""
    sets = {name: error_rates(*zip(*pairs, strict=True)) for name, pairs in texts.items()}
    return Heard(sets, [], [])


def test_a_small_set_counts_as_much_as_a_large_one():
    large, small = [("a b c d", "a b c d")] * 9, [("a b", "a x")]
    found = heard(one=large, two=small)
    assert found.wer == pytest.approx((0 + 0.5) / 2)
    assert found.entry() == {
        "dev_wer": 0.25, "dev_cer": round(found.cer, 5), "dev_wer/one": 0.0, "dev_wer/two": 0.5,
    }  # fmt: skip
    assert "one 0.00%, two 50.00%" in str(found)


def test_one_set_is_reported_as_ever():
    found = heard(dev=[("a b", "a x")])
    assert set(found.entry()) == {"dev_wer", "dev_cer"}
    assert str(found) == "dev WER 50.00%  CER 33.33%"


@pytest.mark.parametrize(("text", "silent"), [("", True), ("a", False)])
def test_silence_is_noticed(text, silent):
    assert heard(dev=[("a b c", text)]).silent == silent


def test_splits_name_their_corpora(tmp_path):
    data = write_corpus(tmp_path, 2)
    train = read_manifest(data / "train.json")
    write_manifest(data / "train-a.json", train[:3])
    write_manifest(data / "train-b.json", train[3:])
    (data / "train.json").unlink()
    splits = load_splits(data)
    assert [u.corpus for u in splits.train] == ["train-a"] * 3 + ["train-b"] * (len(train) - 3)
    assert {u.corpus for u in splits.dev} == {"dev"}


def test_weights_name_corpora_with_or_without_train():
    corpora = ["train-a", "train_b", "c"]
    found = full_names({"a": 2.0, "b": 0.5, "c": 0.0}, corpora)
    assert found == {"train-a": 2.0, "train_b": 0.5, "c": 0.0}
    with pytest.raises(ValueError, match="no corpus 'd'; there are c, train-a, train_b"):
        full_names({"d": 1.0}, corpora)


@pytest.mark.parametrize("text", ["a", "a=x", "a=-1", "a=1,b"])
def test_weights_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="NAME=NUMBER"):
        TrainConfig(corpus_weights=text)


def test_weights_are_read():
    assert TrainConfig(corpus_weights="a=2, b=0.3").weights() == {"a": 2.0, "b": 0.3}
