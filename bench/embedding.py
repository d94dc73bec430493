"""Fig. 1 of the SPUL paper: what the model makes of forget and retain texts, before and after, on a plane.

Last hidden states at the position that answers, of the base model and of the prompted one together, by t-SNE (van der
Maaten and Hinton 2008) with a fixed seed. A picture is no proof: distances between clusters mean nothing in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sklearn.manifold import TSNE

from models.examples import Example
from models.inference import Classifier
from models.llm import FrozenLLM
from models.soft_prompt import SoftPrompt

PERPLEXITY = 30.0


def embedding(
    llm: FrozenLLM, prompts: Mapping[str, Sequence[SoftPrompt]], groups: Mapping[str, Sequence[Example]], *, seed: int
) -> list[dict[str, Any]]:
    """Points with their ``model`` (a name of ``prompts``), ``group`` and label, in the order of the two mappings."""
    classifier = Classifier(llm)
    hidden, points = [], []
    for model, found in prompts.items():
        for group, rows in groups.items():
            hidden.append(classifier.hidden([row.text for row in rows], found).float().cpu())
            points += [{"model": model, "group": group, "label": row.label} for row in rows]
    states = torch.cat(hidden).numpy()
    perplexity = min(PERPLEXITY, (len(states) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(states)
    return [
        {**point, "x": round(float(x), 2), "y": round(float(y), 2)} for point, (x, y) in zip(points, plane, strict=True)
    ]
