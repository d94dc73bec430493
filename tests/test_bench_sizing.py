"""A model of random weights that is sized is served as a real one is."""

from __future__ import annotations

from pathlib import Path

from tiny_models import make_tiny_model

from bench.sizing import Shape, build, measure, words
from models.packing import packable


def test_a_shape_is_built_as_wide_and_deep_as_it_says_and_served_packed(tmp_path: Path) -> None:
    tokenizer, vocabulary = words(str(make_tiny_model(tmp_path / "tiny")))
    llm = build(Shape(32, 3, 4, 2, 64), tokenizer, vocabulary, "none", "cpu")
    assert (llm.hidden_size, len(llm.model.model.layers)) == (32, 3)
    assert len({layer.self_attn.q_proj.weight.data_ptr() for layer in llm.model.model.layers}) == 3
    assert packable(llm)
    found = measure(llm, ["the film is good", "a bad story"] * 64, 4, 1)
    assert found["texts_per_second"] > 0
    assert found["single_seconds"] > 0
