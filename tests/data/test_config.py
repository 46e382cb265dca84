"""The data's keys."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from mamba_pretrain.data.config import DataConfig


def test_path_is_short_for_one_source():
    config = DataConfig(path="data/pile/")
    assert config.sources[0].path == "data/pile/"
    assert config.sources[0].name == "pile"
    assert config.sources[0].weight == 1.0
    assert DataConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": "a", "sources": [{"path": "b"}]}, "sources or path, not both"),
        ({"sources": []}, "at least 1 item"),
        ({"sources": [{"path": "x/a"}, {"path": "y/a"}]}, "two sources are named a"),
        ({"path": "a", "validation_sources": [{"path": "b/a"}]}, "two sources are named a"),
        ({"sources": [{"path": "a", "weight": 0}]}, "greater than 0"),
        ({"path": "a", "packing": "first-fit"}, "'concat' or 'best-fit'"),
        ({"path": "a", "sequence_lenght": 5}, "Extra inputs"),
    ],
)
def test_wrong_values(settings, words):
    with pytest.raises(ValidationError, match=words):
        DataConfig.model_validate(settings)


def test_every_key_is_described():
    for field in DataConfig.model_fields.values():
        assert field.description
