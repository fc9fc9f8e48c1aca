import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "motion",
        "samples",
        "timing",
        "rig",
        "retargeting",
        "emotion",
        "alignment",
        "distribution",
        "editing",
        "perceptual",
        "statistics",
    ],
)
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"metrics.{name}")
    result = doctest.testmod(module, extraglobs=vars(module))
    assert result.attempted > 0
    assert result.failed == 0
