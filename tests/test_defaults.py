"""What empty settings mean, and the message when a file is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from app import defaults
from app.defaults import NotConfigured, resolve_model, resolve_retain
from app.pull import model_path, reviews_dir
from app.settings import Settings


def settings(home: Path, **values: object) -> Settings:
    return Settings(_env_file=None, **{"home": home, "model": "", "adapter": None, "retain": "", **values})


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A demo adapter that is there, whatever the checkout holds."""
    folder = put(tmp_path / "demo_adapter" / "adapter_config.json").parent
    monkeypatch.setattr(defaults, "DEMO_ADAPTER", folder)
    return folder


def test_a_configured_model_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(settings(tmp_path, model="org/name")) == ("org/name", None)
    assert resolve_model(settings(tmp_path, model="m.gguf", adapter="a")) == ("m.gguf", "a")
    assert resolve_model(settings(tmp_path, model="m.gguf", adapter="")) == ("m.gguf", None)


def test_the_demo_model_comes_with_its_adapter(tmp_path: Path, adapter: Path) -> None:
    path = put(model_path(tmp_path))
    assert resolve_model(settings(tmp_path)) == (str(path), str(adapter))


def test_another_adapter_or_none_can_be_set_for_the_demo_model(tmp_path: Path, adapter: Path) -> None:
    path = put(model_path(tmp_path))
    assert resolve_model(settings(tmp_path, adapter="mine")) == (str(path), "mine")
    assert resolve_model(settings(tmp_path, adapter="")) == (str(path), None)


def test_a_missing_model_names_the_command_that_brings_it(tmp_path: Path) -> None:
    with pytest.raises(NotConfigured, match="letheon model pull"):
        resolve_model(settings(tmp_path))


def test_a_missing_adapter_is_never_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(model_path(tmp_path))
    monkeypatch.setattr(defaults, "DEMO_ADAPTER", tmp_path / "nothing")
    with pytest.raises(NotConfigured, match="no adapter"):
        resolve_model(settings(tmp_path))


def test_the_retain_set(tmp_path: Path) -> None:
    assert resolve_retain(settings(tmp_path, retain="mine.csv")) == "mine.csv"
    with pytest.raises(NotConfigured, match="letheon data pull"):
        resolve_retain(settings(tmp_path))
    path = put(reviews_dir(tmp_path) / "train.jsonl")
    assert resolve_retain(settings(tmp_path)) == str(path)
