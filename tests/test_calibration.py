"""Which speech compression may look at, and what is recorded of it."""

import json

import pytest
import torch
from torch import nn

from asr.corpus.manifest import ManifestError
from asr.corpus.splits import load_splits
from asr.network.checkpoint import Checkpoint
from asr.network.model import ConformerCTC
from asr.runtime.config import ModelConfig
from asr.runtime.tokenizer import Tokenizer
from compress import calibration
from compress.imitation import divergence
from tests.corpus import write_corpus


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def checkpoint(corpus):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=5, d_model=16, n_layers=1, n_heads=2, subsampling_channels=4)
    return Checkpoint(
        ConformerCTC(config).eval(), Tokenizer.characters("abc"), data={"train": str(corpus)}
    )


def paths(utterances):
    return {u.audio_filepath.rsplit("/", 1)[1].split("-")[0] for u in utterances}


def test_training_speech_by_default(checkpoint, corpus):
    speech = calibration.load(checkpoint)
    assert speech.source == str(corpus)
    assert sum(len(b.indices) for b in speech.batches) == 18
    assert paths(calibration.speech(checkpoint, str(corpus))) == {"train"}
    assert paths(calibration.speech(checkpoint, str(corpus), "dev")) == {"dev"}
    assert paths(calibration.speech(checkpoint, str(corpus / "dev.json"))) == {"dev"}


def test_what_is_held_out_is_what_training_held_out(tmp_path):
    """By the seed of the training, and where a manifest of any name was split for it."""
    own = [{"step": "train", "config": {"seed": 3}}]
    whole = write_corpus(tmp_path / "corpus") / "train.json"
    manifest = whole.rename(whole.with_name("my_corpus.json"))
    checkpoint = Checkpoint(None, None, data={"train": str(manifest)}, history=own)
    splits = load_splits(manifest, seed=3)
    assert calibration.speech(checkpoint, str(manifest), "dev") == splits.dev
    assert calibration.speech(checkpoint, str(manifest)) == splits.train
    assert load_splits(manifest).dev != splits.dev
    other = Checkpoint(None, None, data={"train": "elsewhere"}, history=own)
    assert len(calibration.speech(other, str(manifest), "dev")) == 18  # named for it, so all of it


def test_the_same_part_every_time(checkpoint):
    first, again = (calibration.load(checkpoint, most=5, batch_size=2) for _ in range(2))
    assert sum(len(b.indices) for b in first.batches) == 5
    for a, b in zip(first.batches, again.batches, strict=True):
        assert torch.equal(a.features, b.features)
        assert torch.equal(a.targets, b.targets)


def test_at_most_so_many_seconds(checkpoint, monkeypatch):
    monkeypatch.setattr(calibration, "SECONDS", 2.0)
    with pytest.raises(ValueError, match="no utterance that calibration can use"):
        calibration.load(checkpoint)
    monkeypatch.setattr(calibration, "SECONDS", 8.0)
    speech = calibration.load(checkpoint)
    assert 6.0 < sum(batch.seconds for batch in speech.batches) < 8.5  # in whole frames


@pytest.mark.parametrize("name", ["test.json", "test-clean.jsonl", "Test_other.json"])
def test_test_data_is_refused(checkpoint, corpus, name):
    renamed = corpus / name
    renamed.write_text((corpus / "dev.json").read_text())
    with pytest.raises(ManifestError, match=r"only test data .* never looks at"):
        calibration.load(checkpoint, str(renamed))
    calibration.load(checkpoint, str(corpus))  # beside training data it is passed over


def test_no_data_no_calibration(checkpoint, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ManifestError, match="neither manifests"):
        calibration.load(checkpoint, str(empty))
    with pytest.raises(ManifestError, match="no such file or folder"):
        calibration.load(checkpoint, str(tmp_path / "gone"))
    checkpoint.data = {"train": str(tmp_path / "gone")}
    with pytest.raises(ValueError, match=r"is gone: give --calibration_data"):
        calibration.load(checkpoint)
    checkpoint.data = {}
    with pytest.raises(ValueError, match=r"names no training data: give --calibration_data"):
        calibration.load(checkpoint)


def test_texts_that_no_alignment_fits_are_left_out(checkpoint, corpus):
    lines = (corpus / "dev.json").read_text().splitlines()
    entry = json.loads(lines[0]) | {"text": "abc" * 50}
    (corpus / "dev.json").write_text("\n".join([json.dumps(entry), *lines[1:]]))
    speech = calibration.load(checkpoint, str(corpus / "dev.json"))
    assert sum(len(b.indices) for b in speech.batches) == len(lines) - 1


def test_hooks_are_gone_afterwards():
    model, seen = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), []
    with calibration.record_inputs(model, ["1"], lambda name, x: seen.append((name, x.shape))):
        model(torch.zeros(4, 2))
    model(torch.zeros(4, 2))
    assert seen == [("1", (4, 3))]


def test_output_gradients_foretell_the_divergence(checkpoint):
    """Noise on a layer's output brings the divergence that they say, within sampling error."""
    model = checkpoint.model
    with torch.no_grad():
        model.head.weight.mul_(5)  # an answer less flat than that of random weights
    speech = calibration.load(checkpoint)
    names = ["blocks.0.ff1.down", "blocks.0.attn.position", "head"]
    grams = calibration.output_gradients(model, speech, names)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    for name in names:
        layer, small = model.get_submodule(name), 0.05 / float(torch.trace(grams[name])) ** 0.5

        def noise(module, args, output, small=small):
            return output + small * torch.randn_like(output)

        divergences, frames = 0.0, 0
        torch.manual_seed(0)
        with torch.no_grad():
            for features, length in calibration.utterances(speech) * 3:
                x = features[:length].unsqueeze(0)
                example = model(x).log_probs
                handle = layer.register_forward_hook(noise)
                log_probs = model(x).log_probs
                handle.remove()
                lengths = torch.tensor([example.shape[1]])
                divergences += float(divergence(log_probs, example, lengths))
                frames += example.shape[1]
        expected = small**2 * float(torch.trace(grams[name])) / 2
        assert divergences / frames == pytest.approx(expected, rel=0.3), name


def test_statistics_seen_through_a_matrix(checkpoint, monkeypatch):
    """Those of x @ map and of g @ map, without ever holding the larger ones."""
    monkeypatch.setattr(calibration, "FIRST", 60)  # long utterances are cut
    speech, names = calibration.load(checkpoint), ["blocks.0.ff1.down"]
    model = checkpoint.model
    weight = model.get_submodule(names[0]).weight.detach()
    whole = calibration.input_moments(model, speech, names)[names[0]]
    seen = calibration.input_moments(model, speech, names, {names[0]: weight.t()})[names[0]]
    torch.testing.assert_close(seen.mean, weight @ whole.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen.gram, weight @ whole.gram @ weight.t(), atol=1e-5, rtol=1e-4)
    gram = calibration.output_gradients(model, speech, names)[names[0]]
    seen_gram = calibration.output_gradients(model, speech, names, {names[0]: weight})[names[0]]
    torch.testing.assert_close(seen_gram, weight.t() @ gram @ weight, atol=1e-5, rtol=1e-4)


def test_gradients_of_long_utterances_are_left_out(checkpoint):
    speech = [(torch.zeros(2000, 80), n) for n in (2000, 50, 1600)]
    assert calibration.short("abc", speech) == ["b", "c"]
    assert calibration.short("a", speech[:1]) == ["a"]
