"""Imports against transformers' Parakeet, where transformers is installed."""

import pytest

pytest.importorskip("transformers", reason="pip install transformers")
from experiments.importing import check_transformers as check


@pytest.mark.parametrize("case", check.CASES)
def test_the_parakeet_of_transformers_is_met(tmp_path, case):
    row = check.compare(tmp_path, case)
    assert row["log_probs"] < check.TOLERANCE, row
    assert row["spread"] > 0.1
