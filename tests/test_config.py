"""Configs: presets, checks that name the value, and the way through JSON."""

import json

import pytest

from asr.runtime.config import (
    PRESETS,
    FeatureConfig,
    ModelConfig,
    config_from_dict,
    config_to_dict,
    preset,
)


def test_small_has_nemos_dimensions():
    config = preset("small")
    assert (config.d_model, config.n_layers, config.n_heads) == (176, 16, 4)
    assert config.conv_kernel_size == 31
    assert config.subsampling_factor == 4


def test_base_has_the_issue_dimensions():
    assert (preset("base").d_model, preset("base").n_layers) == (144, 12)


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    values = json.loads(json.dumps(config_to_dict(preset(name))))
    assert config_from_dict(ModelConfig, values) == preset(name)
    assert isinstance(preset(name).intermediate_layers, tuple)


def test_changes_of_none_keep_the_preset():
    config = preset("base", d_model=None, n_heads=2, vocab_size=64)
    assert (config.d_model, config.n_heads, config.vocab_size) == (144, 2, 64)


def test_unknown_preset_and_keys_are_named():
    with pytest.raises(ValueError, match="'huge' is not one of tiny, base, small, medium, large"):
        preset("huge")
    with pytest.raises(ValueError, match="unknown FeatureConfig keys: colour, n_mel"):
        config_from_dict(FeatureConfig, {"n_mel": 80, "colour": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 145}, "d_model 145"), ({"n_heads": 5}, "n_heads 5"),
        ({"conv_kernel_size": 30}, "30 must be odd"), ({"subsampling": "none"}, "'none'"),
        ({"subsampling_factor": 3}, "3 is not one of 2, 4, 8"), ({"dropout": 1.0}, "dropout"),
        ({"intermediate_layers": (16,)}, r"1\.\.15"), ({"intermediate_layers": (0,)}, r"1\.\.15"),
        ({"n_heads": 0}, "n_heads 0 must be at least 1"), ({"d_model": "8"}, "d_model '8'"),
        ({"intermediate_layers": "2,4"}, "intermediate_layers '2,4'"),
        ({"intermediate_layers": ("2",)}, r"1\.\.15"), ({"dropout": float("nan")}, "dropout nan"),
        ({"self_conditioned": True}, "needs intermediate_layers"),
    ],
)  # fmt: skip
def test_wrong_dimensions_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)
