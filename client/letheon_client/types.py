"""The server's answers, as they come: JSON objects, whose times are RFC 3339 strings.

They are dictionaries at run time, so a newer server's fields stay in them. Tests hold every name and type to the
server's OpenAPI document.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NotRequired, TypedDict

RequestState = Literal[
    "pending",
    "training",
    "evaluating",
    "awaiting_approval",
    "active",
    "suspended",
    "revoked",
    "failed",
    "cancelled",
]
PromptState = Literal["active", "suspended", "revoked"]
DeliveryState = Literal["pending", "sending", "delivered", "failed"]
RevokeCode = Literal["withdrawn", "mistake", "harm", "superseded", "other"]
Mode = Literal["routed", "concatenate"]
ReportFormat = Literal["json", "html", "pdf"]
EvidencePicture = Literal["embedding", "membership"]
ExportFormat = Literal["peft", "safetensors", "vllm"]


@dataclass(frozen=True)
class Event:
    """A server-sent event of a request; ``id`` resumes the stream behind it, and is empty where it was polled."""

    id: str
    type: str  # "state" | "progress"
    data: dict[str, Any]


# --- what is sent ----------------------------------------------------------------------------------------------------


class ForgetText(TypedDict):
    """A text to forget, with the label the model gives it, if known."""

    text: str
    label: NotRequired[str | None]


class RequestFilter(TypedDict, total=False):
    """What a list of requests is narrowed to; all that is given must hold. ``due_before``: not yet in force or over."""

    id_prefix: str
    api_key_id: str
    received_from: str | datetime
    received_before: str | datetime
    due_before: str | datetime


class TrainingOptions(TypedDict, total=False):
    """Training settings of one request; what is left out keeps the server's setting."""

    num_virtual_tokens: int | None
    alpha: float | None
    beta: float | None
    learning_rate: float | None
    max_steps: int | None
    seed: int | None


# --- requests --------------------------------------------------------------------------------------------------------


class Failure(TypedDict):
    code: str
    detail: str


class UnlearnRequest(TypedDict):
    """A request as it stands. It never holds the forget texts."""

    id: str
    state: RequestState
    created_at: str
    updated_at: str
    started_at: str | None
    finished_at: str | None
    num_texts: int
    reason: str | None
    options: dict[str, Any]
    fingerprint: str
    received_at: str | None
    due_at: str | None
    expires_at: str | None
    approval_required: bool
    approved_by: str | None
    approved_at: str | None
    attempt: int
    cancel_requested: bool
    progress: dict[str, Any] | None
    metrics: dict[str, Any] | None
    failure: Failure | None
    overdue: bool


class Submitted(UnlearnRequest):
    """The request, and what the answer's headers say: whether this call made it."""

    duplicate: bool
    """This key's live request for the same texts was there already, and no other was made."""
    replayed: bool
    """An earlier call with this Idempotency-Key made it."""


class UnlearnRequestPage(TypedDict):
    items: list[UnlearnRequest]
    next_cursor: str | None


class SignedReceipt(TypedDict):
    """Verify it with `letheon receipt verify`."""

    receipt: dict[str, Any]
    signature: str


class Rate(TypedDict):
    """0 to 1; an estimate has neither rows nor the 95 % interval."""

    name: str
    rate: float
    rows: int | None
    low: float | None
    high: float | None
    approximate: bool


class Limit(TypedDict):
    rate: float
    at_least: bool


class Figure(TypedDict):
    """A rate before and after, in words, and the limit that it was held against."""

    name: str
    words: str
    short: str
    before: Rate | None
    after: Rate | None
    limit: Limit | None
    kept: bool | None


class HistoryEntry(TypedDict):
    """An entry of the audit log, in words."""

    seq: int
    at: str
    action: str
    hash: str
    what: str


class ReceiptKey(TypedDict):
    algorithm: Literal["Ed25519"]
    id: str
    public_key: str


class Signed(TypedDict):
    """What of a report is signed, and by which key."""

    what: Literal["receipt"]
    key: ReceiptKey


class Report(TypedDict):
    """The signed receipt of a request, and the same in plain words. Only `receipt` is signed."""

    kind: Literal["letheon report"]
    version: Literal[1]
    request_id: str
    state: str
    as_of: str
    summary: list[str]
    history: list[HistoryEntry]
    passed: bool | None
    figures: list[Figure]
    warnings: list[str]
    curve: list[dict[str, Any]]
    meaning: list[str]
    signed: Signed
    receipt: SignedReceipt


class Cluster(TypedDict):
    """Texts of one set and label on the plane, by the bare model and as served, in the same order: pairs (x, y)."""

    set: Literal["forget", "retain"]
    label: str | None
    base: list[list[float]]
    served: list[list[float]]


class Embedding(TypedDict):
    """``moved``: texts that are answered behind the prompt."""

    moved: int
    clusters: list[Cluster]


class Attack(TypedDict):
    """Area under the ROC curve (0.5 is guessing) with its 95 % interval, and the curve as pairs."""

    auc: float
    low: float
    high: float
    roc: list[list[float]]


class Membership(TypedDict):
    """Whether a score tells the forget texts from other texts, before (`base`) and after (`served`)."""

    score: Literal["true label", "base answer"]
    non_members: Literal["held out", "retain"]
    members: int
    others: int
    base: Attack
    served: Attack


class Evidence(TypedDict):
    """Made when the request was checked, by itself. No proof that anything is forgotten."""

    request_id: str
    created_at: str
    version: int
    mode: str
    prompt_digest: str
    seed: int
    embedding: Embedding
    membership: Membership
    software: dict[str, Any]
    seconds: float


class ForgetSet(TypedDict):
    """The texts among themselves, and as they are answered today. Places count from 0."""

    texts: int
    different: int
    exact_duplicates: list[int]
    near_duplicates: list[int]
    already_unknown: list[int] | None
    already_unknown_share: float | None


class RetainOverlap(TypedDict):
    """The forget texts in the operator's retain set."""

    rows: int
    withheld: int
    withheld_share: float
    texts: list[int]
    near_rows: int
    near_texts: list[int]


class Gate(TypedDict):
    """The gate that would be fitted."""

    own_recall: float
    subjects: int
    unseen_claimed: float | None
    unseen_certain: float | None


class BlastRadius(TypedDict):
    """What the gate would claim of retain rows that had no say in it; ``low`` and ``high`` are a 95 % interval."""

    rows: int
    claimed: int
    share: float
    low: float
    high: float
    share_with_active_set: float | None


class Cost(TypedDict):
    planned_steps: int
    seconds_per_step: float | None
    seconds: float | None
    basis: str


class DryRun(TypedDict):
    """What a request would do. Null is what cannot be told, and a warning says why."""

    mode: Mode
    fingerprint: str
    active_set_version: int
    forget: ForgetSet
    retain: RetainOverlap | None
    gate: Gate | None
    blast_radius: BlastRadius | None
    cost: Cost
    obstacles: list[Failure]
    warnings: list[str]


# --- classify --------------------------------------------------------------------------------------------------------


class Classification(TypedDict):
    """``confidence`` and ``scores`` only when asked for."""

    label: str
    abstained: bool
    confidence: NotRequired[float | None]
    scores: NotRequired[dict[str, float] | None]


class Classified(TypedDict):
    """Results in the order of the texts, all under one active set."""

    results: list[Classification]
    active_set_version: int


class ManyClassified(TypedDict):
    """The same for several calls; more than one version where the set changed in between."""

    results: list[Classification]
    active_set_versions: list[int]


# --- prompts, active sets, audit -------------------------------------------------------------------------------------


class Prompt(TypedDict):
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
    activated_at: str
    revoked_at: str | None
    revoked_by: str | None
    revoke_code: str | None
    revoke_reason: str | None
    revoke_asked_by: str | None
    revoke_asked_at: str | None


class RevokedPrompt(Prompt):
    """Its state is still what it was where another admin has to agree."""

    active_set_version: int


class PromptPage(TypedDict):
    items: list[Prompt]
    next_cursor: str | None


class ActiveSet(TypedDict):
    """One version of the active set, in force now or once. Equal digests, equal behaviour."""

    version: int
    digest: str
    size: int
    created_at: str
    created_by: str
    reason: str | None
    checks: dict[str, Any] | None


class ActiveSetPage(TypedDict):
    items: list[ActiveSet]
    next_before: int | None


class AuditEntry(TypedDict):
    """One thing that happened: ids, digests and codes, never free text."""

    seq: int
    at: str
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]
    prev_hash: str
    hash: str


class AuditPage(TypedDict):
    items: list[AuditEntry]
    next_before: int | None


class AuditCheckpoint(TypedDict):
    """A signed statement: at that time the log had ``seq`` entries, and the last one had this hash."""

    kind: Literal["checkpoint"]
    seq: int
    hash: str
    at: str
    key_id: str
    public_key: str
    signature: str


class PublicKey(TypedDict):
    algorithm: Literal["Ed25519"]
    key_id: str
    public_key: str


# --- webhooks --------------------------------------------------------------------------------------------------------


class Webhook(TypedDict):
    """``url`` is null for all but its owner."""

    id: str
    api_key_id: str
    url: str | None
    states: list[RequestState]
    all_requests: bool
    created_at: str
    disabled_at: str | None


class WebhookCreated(Webhook):
    secret: str
    """What its messages are signed with; shown only now."""


class WebhookPage(TypedDict):
    items: list[Webhook]
    next_cursor: str | None


class Delivery(TypedDict):
    """One message, and how its delivery went."""

    id: str
    webhook_id: str
    request_id: str | None
    state: DeliveryState
    attempts: int
    next_at: str | None
    created_at: str
    delivered_at: str | None
    last_status: int | None
    last_error: str | None
    payload: dict[str, Any]


class DeliveryPage(TypedDict):
    items: list[Delivery]
    next_cursor: str | None


# --- health, problems ------------------------------------------------------------------------------------------------


class Health(TypedDict):
    status: str


class FieldError(TypedDict):
    """One thing that is wrong with a call; ``limit`` is the limit that was passed, if it is one."""

    field: str
    message: str
    limit: NotRequired[float | None]


class Problem(TypedDict):
    """An RFC 9457 problem; some kinds have further members."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    errors: NotRequired[list[FieldError] | None]
