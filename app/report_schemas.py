"""What a report looks like over the wire, where it is asked for as JSON."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, Field

from app.audit_schemas import SignedReceipt


class ReportFormat(StrEnum):
    JSON = "json"
    HTML = "html"
    PDF = "pdf"


class RateOut(BaseModel):
    """A rate, 0..1, as the receipt has it; estimates of older requests have neither rows nor interval."""

    name: str
    rate: float
    rows: int | None
    low: float | None = Field(description="Of the 95 % interval.")
    high: float | None
    approximate: bool = Field(description="Whether the interval is.")


class LimitOut(BaseModel):
    rate: float
    at_least: bool = Field(description="Whether it is the least that the rate after may be; else the most.")


class FigureOut(BaseModel):
    """A rate before and after, in words, and the limit that it was held against."""

    name: str
    words: str
    short: str
    before: RateOut | None
    after: RateOut | None
    limit: LimitOut | None
    kept: bool | None = Field(description="Whether the limit was; null without one.")


class HistoryOut(BaseModel):
    """An entry of the audit log, in words."""

    seq: int
    at: str
    action: str
    hash: str
    what: str


class KeyOut(BaseModel):
    algorithm: Literal["Ed25519"]
    id: str
    public_key: str


class SignedOut(BaseModel):
    """What of the report is signed, and by which key."""

    what: Literal["receipt"]
    key: KeyOut


class ReportOut(BaseModel):
    """The signed receipt of a request, and the same in plain words. Only `receipt` is signed."""

    kind: Literal["letheon report"]
    version: Literal[1]
    request_id: str
    state: str
    as_of: str = Field(description="When the request last changed. There is no time of the report itself.")
    summary: list[str]
    history: list[HistoryOut]
    passed: bool | None
    figures: list[FigureOut]
    warnings: list[str]
    curve: list[dict[str, Any]] = Field(description="Losses of the last training, by step.")
    meaning: list[str]
    signed: SignedOut
    receipt: SignedReceipt
