"""scripts/average_models.py: the mean of weights and statistics, of models that fit together."""

import pytest
import torch

from asr.network.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from asr.runtime.tokenizer import Tokenizer
from compress import core, recipes
from scripts.average_models import main
from tests.conftest import build_tiny_model


def saved(path, tokenizer=None, **changes):
    """A tiny model with weights of its own; fp16 or int8 where asked for."""
    precision = changes.pop("precision", "")
    model = build_tiny_model(**changes)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(
                    0.1 * torch.rand(value.shape, generator=torch.manual_seed(len(path.name)))
                )
    checkpoint = Checkpoint(model, tokenizer or Tokenizer.characters(), history=[{"step": "train"}])
    if precision:
        checkpoint = core.run(
            checkpoint, [recipes.make_step("quantization", {"precision": precision})]
        )
    save_checkpoint(path, checkpoint)
    return str(path)


def test_the_mean_of_all(tmp_path, capsys):
    files = [saved(tmp_path / name) for name in ("a.pt", "bb.pt")]
    files.append(saved(tmp_path / "ccc.pt", precision="fp16"))
    output = tmp_path / "mean.pt"
    assert main(["--model_path", *files, "--output_path", str(output)]) == 0
    result = load_checkpoint(output)
    states = [load_checkpoint(path).model.state_dict() for path in files]
    for key, value in result.model.state_dict().items():
        mean = torch.stack([state[key].double() for state in states]).mean(0).to(value.dtype)
        torch.testing.assert_close(value, mean, rtol=1e-6, atol=1e-7)
    assert [entry["step"] for entry in result.history] == ["train", "average"]
    assert len(result.history[1]["config"]["models"].split()) == 3
    assert main(["--model_path", *files, "--output_path", str(output)]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": Tokenizer.characters("abcdefghijklmnopqrstuvwxyz-")}, "has other tokens"),
        ({"d_model": 16}, "has other dimensions"),
        ({"precision": "int8"}, "is compressed"),
    ],
)
def test_models_that_do_not_fit(tmp_path, capsys, changes, message):
    files = [saved(tmp_path / "a.pt"), saved(tmp_path / "b.pt", **changes)]
    assert main(["--model_path", *files, "--output_path", str(tmp_path / "mean.pt")]) == 2
    assert f"b.pt: {message}" in capsys.readouterr().err
    assert not (tmp_path / "mean.pt").exists()
