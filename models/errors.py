"""Errors of the ML core. Messages name files, fields and limits; never a text, so they are safe to show and to log."""

from __future__ import annotations


class ModelError(Exception):
    """Base: the model cannot be loaded or used as asked."""


class InvalidTemplate(ModelError):
    """The template has not exactly one ``{text}`` or nothing after it."""


class InvalidVerbalizer(ModelError):
    """A label word is not one token of this tokenizer, or two words share a token."""


class DatasetError(ModelError):
    """A dataset cannot be read or lacks usable rows."""


class InvalidPrompt(ModelError):
    """Bytes that are not a soft prompt of the expected shape and dtype, or hold non-finite numbers."""


class InvalidGate(ModelError):
    """Bytes that are not a gate or a gate space of the expected shapes."""


class FingerprintMismatch(ModelError):
    """The soft prompt was trained for another frozen model; using it would be undefined."""


class TrainingDiverged(ModelError):
    """The loss is not finite."""


class NotFinite(ModelError):
    """Numbers of a pass that are none: there is no answer in them."""


class CheckpointError(ModelError):
    """A checkpoint does not belong to this run (other shapes, seed or fingerprint) or is damaged."""


class TextTooLong(ModelError):
    """A text with template and prompts does not fit the model's positions."""
