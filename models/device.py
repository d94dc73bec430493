"""Whether the accelerator of a model still computes."""

from __future__ import annotations

import logging

import torch

from models.inference import Classifier
from models.llm import FrozenLLM

log = logging.getLogger("letheon.models")

PROBE = "good"
"""A text of our own."""


def is_lost(llm: FrozenLLM, error: Exception) -> bool:
    """After this error, in the thread that computes: does the device fail on a text of ours, too?

    Then its context is lost, and every call fails until another process makes a new one. Out of memory is another
    class of error, and a launch that only some texts made impossible harms no other ones.
    """
    if not isinstance(error, torch.AcceleratorError):
        return False
    try:
        Classifier(llm).classify([PROBE])
    except Exception as again:  # its message might quote what it was given
        log.error("the device was tried again: %s", type(again).__name__)
        return isinstance(again, torch.AcceleratorError)
    return False
