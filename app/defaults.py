"""What an empty ``LETHEON_MODEL`` and ``LETHEON_RETAIN`` mean: the demo model and the demo reviews."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, TypedDict

from app.errors import LetheonError
from app.pull import model_path, reviews_dir
from app.settings import Quantization, Settings

DEMO_ADAPTER = Path(__file__).resolve().parent.parent / "models" / "demo_adapter"


class NotConfigured(LetheonError):
    """A file that the defaults need is not there yet; the message names the command that brings it."""

    status: ClassVar[int] = 503
    code: ClassVar[str] = "not-configured"
    title: ClassVar[str] = "The model or its data is missing"


class LoadArguments(TypedDict):
    """What ``FrozenLLM.load`` is called with."""

    source: str
    adapter: str | None
    quantization: Quantization
    device: str
    template: str
    labels: list[str]
    generic_labels: list[str]


def load_arguments(settings: Settings) -> LoadArguments:
    """The configured model. API and worker both load it with these: any difference is another fingerprint.

    Raises NotConfigured.
    """
    source, adapter = resolve_model(settings)
    return {
        "source": source,
        "adapter": adapter,
        "quantization": settings.quantization,
        "device": settings.device,
        "template": settings.template,
        "labels": settings.labels,
        "generic_labels": settings.generic_labels,
    }


def resolve_model(settings: Settings) -> tuple[str, str | None]:
    """The model source and its adapter. Raises NotConfigured when the demo model or adapter is not there.

    An adapter that is set stays in force; set to the empty string, it means "no adapter", the bare demo model.
    """
    if settings.model:
        return settings.model, settings.adapter or None
    path = model_path(settings.home)
    if not path.is_file():
        raise NotConfigured(f"{path} is missing: run `letheon model pull`, or set LETHEON_MODEL")
    if settings.adapter is not None:
        return str(path), settings.adapter or None
    if not (DEMO_ADAPTER / "adapter_config.json").is_file():
        raise NotConfigured(
            f"{DEMO_ADAPTER} holds no adapter: the demo model has not learned the task without it. "
            "Run `letheon finetune`, then set LETHEON_ADAPTER to its output"
        )
    return str(path), str(DEMO_ADAPTER)


def resolve_retain(settings: Settings) -> str:
    """The retain set: a file or a dataset id. Raises NotConfigured when the demo reviews are not there."""
    if settings.retain:
        return settings.retain
    path = reviews_dir(settings.home) / "train.jsonl"
    if not path.is_file():
        raise NotConfigured(f"{path} is missing: run `letheon data pull`, or set LETHEON_RETAIN")
    return str(path)


def resolve_held_out(settings: Settings) -> str | None:
    """Texts that the model was never trained on: a file or a dataset id; None where there are none."""
    if settings.held_out:
        return settings.held_out
    path = reviews_dir(settings.home) / "held_out.jsonl"
    return str(path) if not settings.retain and path.is_file() else None
