"""What goes over the wire. Bodies are strict: unknown fields and wrong types are refused, nothing is coerced."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    computed_field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from app.settings import Mode
from app.tables import OPEN, PromptState, RequestState, utcnow


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "must not be blank")
    return text


def _is_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair
        raise PydanticCustomError("surrogate", "must not contain half a surrogate pair") from None
    return text


def _no_nul(text: str) -> str:
    if "\0" in text:  # PostgreSQL has no such character
        raise PydanticCustomError("nul", "must not contain NUL")
    return text


# The patterns are for the document; what a client is told of a breach says more than they do.
_SOLID = WithJsonSchema({"type": "string", "pattern": r"\S"})
Text = Annotated[str, AfterValidator(_is_unicode), AfterValidator(_not_blank), _SOLID]
Reason = Annotated[
    str,
    StringConstraints(max_length=500),
    AfterValidator(_is_unicode),
    AfterValidator(_no_nul),
    WithJsonSchema({"type": "string", "maxLength": 500, "pattern": r"^[^\u0000]*$"}),
]
SolidReason = Annotated[
    Reason,
    AfterValidator(_not_blank),
    WithJsonSchema({"type": "string", "maxLength": 500, "pattern": r"^[^\u0000]*[^\s\u0000][^\u0000]*$"}),
]


_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


def _rfc_3339(value: Any) -> Any:
    if not isinstance(value, str) or not _RFC_3339.fullmatch(value):  # pydantic would take a number, too
        raise PydanticCustomError("moment", "must be a time with its zone, such as 2026-11-28T09:30:00Z")
    return value


Moment = Annotated[AwareDatetime, Field(strict=False), BeforeValidator(_rfc_3339)]


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:  # the first and the last day of the calendar
        raise PydanticCustomError("moment", "must be a time that there is in UTC") from None


UtcMoment = Annotated[Moment, AfterValidator(_in_utc)]

MAX_ENTRIES = 16_384
"""Of any list in a body. A body of millions of tiny entries is refused before each of them gets an error of its own."""
MAX_NAMES = 32


def _few_entries(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MAX_ENTRIES:
        raise PydanticCustomError("too_long", "must have at most {max_length} entries", {"max_length": MAX_ENTRIES})
    return value


FewEntries = BeforeValidator(_few_entries)


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _plain_fields(cls, value: Any) -> Any:
        """Few names; and 7.0 is 7, as in JSON Schema: some languages know no other way to write it."""
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_NAMES:
            raise PydanticCustomError("too_long", "must have at most {max_length} fields", {"max_length": MAX_NAMES})
        return {name: int(v) if _is_whole(v) else v for name, v in value.items()}


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer() and abs(value) < 2**53


class Row(BaseModel):
    model_config = ConfigDict(from_attributes=True)


# --- requests --------------------------------------------------------------------------------------------------------


class ForgetTextIn(Body):
    """A text to forget, with the label the model gives it, if known."""

    text: Text
    label: str | None = None


def _as_object(value: Any) -> Any:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise PydanticCustomError("forget_text", "must be a string or an object with a text")
    return value


ForgetTextItem = Annotated[ForgetTextIn, BeforeValidator(_as_object, json_schema_input_type=Text | ForgetTextIn)]


class TrainingOptions(Body):
    """Training settings of this request alone; what is left out keeps the server's setting."""

    num_virtual_tokens: int | None = Field(default=None, ge=1, le=256)
    alpha: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False, description="Weight of L_r.")
    beta: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False, description="Weight of L_kl.")
    learning_rate: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    max_steps: int | None = Field(default=None, ge=1, le=100_000)
    seed: int | None = Field(default=None, ge=0, lt=2**32)


class UnlearnRequestIn(Body):
    """What to forget. Entries that are equal, label included, count once."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "forget_texts": [
                        "Jane Example was the best part of the film.",
                        {"text": "I would not watch Jane Example again.", "label": "negative"},
                    ],
                    "reason": "Erasure request 2026-118",
                    "received_at": "2026-11-20T09:30:00+01:00",
                    "options": {"num_virtual_tokens": 30},
                }
            ]
        }
    )

    forget_texts: Annotated[list[ForgetTextItem], FewEntries] = Field(
        min_length=1, description="1 to the server's maximum (4096 by default)."
    )
    reason: Reason | None = Field(default=None, description="Kept with the request; put no personal data here.")
    options: TrainingOptions | None = None
    received_at: Moment | None = Field(
        default=None,
        description="When the person asked; a year ago at most. Its month ends at `due_at`. Default: now.",
    )
    expires_at: Moment | None = Field(
        default=None, description="Then the prompt is revoked, and what it hid is answered again. Default: never."
    )
    require_approval: bool = Field(
        default=False,
        description="Another key has to agree before the prompt comes into force. False does not undo the server's "
        "setting.",
    )


class Failure(BaseModel):
    code: str
    detail: str


class UnlearnRequestOut(Row):
    """A request as it stands. It never holds the forget texts."""

    id: str
    state: RequestState
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    num_texts: int
    reason: str | None
    options: dict[str, Any]
    fingerprint: str = Field(description="Of the frozen model that the prompt is trained for.")
    received_at: datetime | None
    due_at: datetime | None = Field(description="By when it has to be active.")
    expires_at: datetime | None
    approval_required: bool
    approved_by: str | None = Field(description="The API key that agreed.")
    approved_at: datetime | None
    attempt: int
    cancel_requested: bool
    progress: dict[str, Any] | None
    metrics: dict[str, Any] | None
    failure: Failure | None

    @computed_field(description="Past its `due_at`, and neither active nor ended.")  # type: ignore[prop-decorator]
    @property
    def overdue(self) -> bool:
        return self.state in OPEN and self.due_at is not None and self.due_at <= utcnow()


class RejectIn(Body):
    """Why a request is not to come into force. It ends, and its texts are destroyed."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"reason": "Not the person's own texts"}]})

    reason: SolidReason


class UnlearnRequestPage(BaseModel):
    items: list[UnlearnRequestOut]
    next_cursor: str | None = Field(description="Ask again with this as `cursor`; null on the last page.")


# --- classify --------------------------------------------------------------------------------------------------------


class ClassifyIn(Body):
    """One `text`, or several `texts`; not both."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"text": "A wonderful film."}, {"texts": ["Dull.", "Great cast."]}],
            "oneOf": [
                {"required": ["text"], "properties": {"text": {"type": "string"}}},
                {"required": ["texts"], "properties": {"texts": {"type": "array"}}},
            ],
        }
    )

    text: Text | None = None
    texts: Annotated[list[Text] | None, FewEntries] = Field(
        default=None, min_length=1, description="1 to the server's maximum (256)."
    )
    scores: bool = Field(default=False, description="Add `confidence` and `scores`; needs the scope `scores`.")
    min_version: int | None = Field(
        default=None,
        ge=0,
        lt=2**31,
        description="503 unless the active set has this version or a later one. Every answer follows what was "
        "acknowledged before it started; this is for a client that wants to see it held.",
    )
    timeout_seconds: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="503 without an answer by then; 30 by default and at most."
    )


class ClassificationOut(BaseModel):
    label: str = Field(description="One of the labels, or `unknown`.")
    abstained: bool = Field(description="True when a generic label won: the answer is `unknown`.")
    confidence: float | None = Field(default=None, description="Probability of the answer. Only when asked for.")
    scores: dict[str, float] | None = Field(
        default=None, description="Probability of each answer. Only when asked for."
    )


class ClassifyOut(BaseModel):
    """One shape for one text and for many; results in the order of the texts."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"results": [{"label": "positive", "abstained": False}], "active_set_version": 4}]
        }
    )

    results: list[ClassificationOut]
    active_set_version: int = Field(description="The active set that every one of these answers was made under.")


# --- admin and health ------------------------------------------------------------------------------------------------


class PromptOut(Row):
    """A trained prompt's record. The prompt itself is never served."""

    id: str
    request_id: str
    state: PromptState
    position: int
    fingerprint: str
    num_virtual_tokens: int
    hidden_size: int
    digest: str
    mode: Mode
    gate_digest: str | None
    metrics: dict[str, Any]
    seconds_to_active: float
    activated_at: datetime
    revoked_at: datetime | None
    revoked_by: str | None
    revoke_code: str | None
    revoke_reason: str | None
    revoke_asked_by: str | None = Field(description="The API key that asked first, where two have to.")
    revoke_asked_at: datetime | None


class RevokedOut(PromptOut):
    """The prompt, and the set that is in force: without it, or still with it where another admin has to agree."""

    active_set_version: int = Field(description="What is classified from now on has this version or a later one.")


class PromptPage(BaseModel):
    items: list[PromptOut]
    next_cursor: str | None = Field(description="Ask again with this as `cursor`; null on the last page.")


class ActiveSetOut(Row):
    """One version of the active set, in force now or once."""

    version: int
    digest: str = Field(description="Over the prompts and gates in it, in order: equal digests, equal behaviour.")
    size: int = Field(description="Prompts in force.")
    created_at: datetime
    created_by: str
    reason: str | None = Field(description="Why it was restored, where it was.")
    checks: dict[str, Any] | None = Field(description="What the checks of this set have found.")


class ActiveSetPage(BaseModel):
    items: list[ActiveSetOut]
    next_before: int | None = Field(description="Ask again with this as `before`; null on the last page.")


class RestoreIn(Body):
    """Why an earlier set comes back. What was forgotten since is no longer forgotten."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"reason": "Version 7 hides too much"}]})

    reason: SolidReason


class RevokeIn(Body):
    """Why the prompt goes. Revoking un-forgets: the old behaviour comes back."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"code": "withdrawn", "reason": "The person changed her mind"}]}
    )

    code: Literal["withdrawn", "mistake", "harm", "superseded", "other"] = Field(
        default="other", description="Goes into the audit log, which takes no free text."
    )
    reason: SolidReason


class Health(BaseModel):
    status: str


class Readiness(Health):
    degraded: list[Literal["key-store"]] = Field(
        description="What does not answer and is not needed for classifications. `key-store`: new requests, webhooks "
        "and receipts are answered 503, trainings wait."
    )
