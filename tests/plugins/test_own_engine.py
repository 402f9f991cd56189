"""Engines from YAML: one of a user's folder by its import path, and the static cache."""

from pathlib import Path

import pytest
import yaml
from plugin_helpers import metrics, run, small

ENGINE = '''
import torch
from lit_rlhf import Engine
from lit_rlhf.rollout.generation import as_experience

class Echo(Engine):
    """Answers every prompt with its own last tokens."""
    def __init__(self, length: int = 2) -> None:
        self.length = length

    def generate(self, model, tokens, attention_mask, sampling, pad_id, eos_ids, *, samples=1, **options):
        tokens, mask = (t.repeat_interleave(samples, dim=0) for t in (tokens, attention_mask))
        return as_experience(tokens, mask, tokens[:, -self.length :], torch.tensor(eos_ids))
'''


@pytest.mark.slow
def test_an_engine_of_ones_own_by_its_import_path_in_yaml(own_folder: Path) -> None:
    (own_folder / "my_engines.py").write_text(ENGINE)
    engine = {"model": {"engine": {"class_path": "my_engines.Echo", "init_args": {"length": 3}}}}
    (own_folder / "engine.yaml").write_text(yaml.safe_dump(engine))
    run(own_folder, *small("-c", "engine.yaml"))
    assert {float(row["rollout/response_length"]) for row in metrics(own_folder).values()} == {3.0}


@pytest.mark.slow
def test_the_static_cache_from_yaml_gives_the_same_numbers(own_folder: Path) -> None:
    run(own_folder, *small())
    run(own_folder, *small("--model.engine=TransformersEngine", "--model.engine.cache=static"))
    dynamic, static = metrics(own_folder, 0), metrics(own_folder, 1)
    assert dynamic.keys() == static.keys()
    for epoch, row in dynamic.items():
        for name, value in row.items():
            if value:
                assert float(static[epoch][name]) == pytest.approx(float(value), rel=1e-3, abs=1e-4)
