"""What a dry run reports: counts, shares, and places in the list that was sent. Never a text, of either side."""

from __future__ import annotations

from pydantic import BaseModel, Field

from app.schemas import Failure
from app.settings import Mode

Places = list[int]


class ForgetSetOut(BaseModel):
    """The texts among themselves, and as they are answered today. Places count from 0."""

    texts: int
    different: int = Field(description="Of them, those that are trained on: equal entries, label included, count once.")
    exact_duplicates: Places = Field(description="Equal to an earlier one, letter case and spacing aside.")
    near_duplicates: Places = Field(description="Much like an earlier one by their spelling, and not equal to any.")
    already_unknown: Places | None = Field(
        description="Answered `unknown` today, by whatever is in force. Null without the scope `classify`."
    )
    already_unknown_share: float | None


class RetainOverlapOut(BaseModel):
    """The forget texts in the operator's retain set."""

    rows: int = Field(description="Of the retain set.")
    withheld: int = Field(
        description="Rows that repeat one of the texts. A request keeps them out of training, if no earlier one has."
    )
    withheld_share: float = Field(description="Of all rows.")
    texts: Places = Field(description="Forget texts that a row repeats.")
    near_rows: int = Field(
        description="Rows much like a forget text by their spelling (estimated Jaccard similarity of character 5-grams "
        "of 0.6 or more). They stay, and teach what is asked to be forgotten: ask for them too, or take them out."
    )
    near_texts: Places = Field(description="Forget texts that such a row is like.")


class GateOut(BaseModel):
    """The gate that the worker would fit, in mode `routed`."""

    own_recall: float = Field(description="Share of the texts that it reaches.")
    subjects: int = Field(description="Directions that it needs: what the texts are on.")
    unseen_claimed: float | None = Field(description="Of other texts on their subject, what it would claim: estimated.")
    unseen_certain: float | None = Field(description="And what it would decide without its prompt.")


class BlastRadiusOut(BaseModel):
    """What the gate would claim of retain rows that had no say in it: texts as they come in, and to be answered."""

    rows: int
    claimed: int
    share: float
    low: float = Field(description="95 % interval of the share (Wilson).")
    high: float
    share_with_active_set: float | None = Field(
        description="The same by this gate or any of those in force. Null without the scope `classify`."
    )


class CostOut(BaseModel):
    planned_steps: int = Field(
        description="Of the first training. It may converge earlier; a failed check has another."
    )
    seconds_per_step: float | None
    seconds: float | None = Field(description="Of training: gate, checks and waiting come on top.")
    basis: str = Field(description="What the seconds rest on.")


class DryRunOut(BaseModel):
    """What a request would do, before it is made. Null is what cannot be told, and a warning says why."""

    mode: Mode
    fingerprint: str = Field(description="Of the frozen model.")
    active_set_version: int = Field(description="The set in force while it was asked.")
    forget: ForgetSetOut
    retain: RetainOverlapOut | None
    gate: GateOut | None
    blast_radius: BlastRadiusOut | None
    cost: CostOut
    obstacles: list[Failure] = Field(description="What the worker would end the request with, as far as it shows now.")
    warnings: list[str]
