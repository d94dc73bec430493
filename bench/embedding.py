"""Fig. 1 of the SPUL paper: what the model makes of forget and retain texts, before and after, on a plane.

Last hidden states at the position that answers, of the base model and of the prompted one together, by ``models.tsne``.
A picture is no proof: distances between clusters mean nothing in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from models.examples import Example
from models.inference import Classifier
from models.llm import FrozenLLM
from models.soft_prompt import SoftPrompt
from models.tsne import tsne


def embedding(
    llm: FrozenLLM, prompts: Mapping[str, Sequence[SoftPrompt]], groups: Mapping[str, Sequence[Example]], *, seed: int
) -> list[dict[str, Any]]:
    """Points with their ``model`` (a name of ``prompts``), ``group`` and label, in the order of the two mappings."""
    classifier = Classifier(llm)
    hidden, points = [], []
    for model, found in prompts.items():
        for group, rows in groups.items():
            hidden.append(classifier.hidden([row.text for row in rows], found).cpu())
            points += [{"model": model, "group": group, "label": row.label} for row in rows]
    plane = tsne(torch.cat(hidden), seed=seed).tolist()
    return [{**point, "x": round(x, 2), "y": round(y, 2)} for point, (x, y) in zip(points, plane, strict=True)]
