"""What a request's evidence looks like over the wire."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field

Pair = tuple[float, float]


class Cluster(BaseModel):
    """Texts of one set and label on the plane, in both views and in the same order, which is not the texts'."""

    set: Literal["forget", "retain"]
    label: str | None = Field(description="Null where the texts came without one.")
    base: list[Pair] = Field(description="By the bare model.")
    served: list[Pair] = Field(description="As the request has them answered; where no prompt is, the same place.")


class Embedding(BaseModel):
    """Last hidden states at the position that predicts the label, of both views together, by t-SNE: no proof."""

    moved: int = Field(description="Texts that are answered behind the prompt.")
    clusters: list[Cluster]


class Attack(BaseModel):
    """0.5 is guessing. Below it the attack works the other way round: the texts stand out by being refused."""

    auc: float = Field(ge=0, le=1)
    low: float = Field(description="Of the 95 % interval, by Newcombe's method.")
    high: float
    roc: list[Pair] = Field(description="Shares of non-members and of members that score at least so much.")


class Membership(BaseModel):
    """Whether a score tells the forget texts from other texts, before and after."""

    score: Literal["true label", "base answer"] = Field(
        description="The probability of the true label; where a text has none, of the base model's own answer."
    )
    non_members: Literal["held out", "retain"] = Field(
        description="`retain`: the model may have been trained on them as well, so 0.5 is to be expected before."
    )
    members: int
    others: int
    base: Attack
    served: Attack


class EvidenceOut(BaseModel):
    """Made when the request was checked, by itself: whatever else was in force. No proof that anything is forgotten."""

    request_id: str
    created_at: datetime
    version: int
    mode: str
    prompt_digest: str
    seed: int
    embedding: Embedding
    membership: Membership
    software: dict[str, str]
    seconds: float = Field(description="That it took the worker.")
