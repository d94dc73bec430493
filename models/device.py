"""The accelerator of a model: whether it still computes, and the memory that others may have of it."""

from __future__ import annotations

import logging
from contextlib import suppress

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


def give_memory_back(llm: FrozenLLM) -> None:
    """What torch keeps of a training for the next one: on one GPU the server may need it meanwhile."""
    if llm.device.type == "cuda":
        with suppress(torch.AcceleratorError):  # lost, and found out elsewhere
            torch.cuda.empty_cache()
