"""Gates: does a query concern an erasure request?

A gate is a direction in a space that all gates share: mean early hidden states of a text (``models.text_states``),
whitened on retain rows and scaled to unit length. What all texts have in common is small there, and what is rare in a
text, such as a name, is most of what is left. So the mean of a few forget texts is a direction that unseen texts about
the same subject share, and the score is a cosine: linear, one matrix product for any number of gates.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from safetensors.torch import load, save
from torch import Tensor

from models.errors import DatasetError, FingerprintMismatch, InvalidGate
from models.soft_prompt import UNREADABLE, header_fingerprint, same_digest

RIDGE = 0.02  # of the mean variance of a direction
MAX_RANK = 1024  # directions that are whitened one by one; the others share one variance
NEVER = 2.0  # above every cosine


@dataclass(frozen=True, eq=False, repr=False)
class GateSpace:
    """States (N, D) → unit points (N, D). D = L·d: the layers of ``text_states`` side by side.

    ``scale`` (D,) brings the layers to one size. ``basis`` (D, r) and ``gain`` (r,) whiten: the map is S^(-1/2) up to a
    factor, where S is the covariance of which ``basis`` holds the leading eigenvectors, plus a ridge.
    """

    fingerprint: str
    center: Tensor
    scale: Tensor
    basis: Tensor
    gain: Tensor

    def points(self, states: Tensor) -> Tensor:
        z = (states - self.center) * self.scale
        z = z + ((z @ self.basis) * self.gain) @ self.basis.T
        return torch.nn.functional.normalize(z, dim=-1)

    def to(self, device: torch.device) -> GateSpace:
        """Itself where it is there already, else one copy for as long as it lives."""
        if self.basis.device == device:
            return self
        copies: dict[torch.device, GateSpace] = self.__dict__.setdefault("_copies", {})
        if device not in copies:
            tensors = (self.center, self.scale, self.basis, self.gain)
            copies[device] = GateSpace(self.fingerprint, *(tensor.to(device) for tensor in tensors))
        return copies[device]

    @cached_property
    def digest(self) -> str:
        """SHA-256 hex of ``to_bytes()``: a gate names the space that it was fitted in."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        tensors = {n: getattr(self, n).contiguous() for n in ("center", "scale", "basis", "gain")}
        return save(tensors, metadata={"fingerprint": self.fingerprint})

    @classmethod
    def from_bytes(cls, data: bytes, *, fingerprint: str, digest: str | None = None) -> GateSpace:
        """``digest``: as ``SoftPrompt.from_bytes`` has it.

        Raises InvalidGate for bytes that are not a space, FingerprintMismatch for one of another model.
        """
        f32 = torch.float32
        tensors = _load(data, {"center": (1, f32), "scale": (1, f32), "basis": (2, f32), "gain": (1, f32)}, digest)
        width, rank = tensors["basis"].shape
        if len(tensors["center"]) != width or len(tensors["scale"]) != width or len(tensors["gain"]) != rank:
            raise InvalidGate("the shapes of a gate space do not agree")
        if header_fingerprint(data) != fingerprint:
            raise FingerprintMismatch(f"the gate space is of another model than {fingerprint[:12]}")
        space = cls(fingerprint, **tensors)
        # Of the bytes as they were stored: gates name the space by it, whatever a later library would write.
        space.__dict__["digest"] = hashlib.sha256(data).hexdigest()
        return space


def fit_space(states: Tensor, layers: int, *, fingerprint: str) -> GateSpace:
    """Whiten on states (N, D) of retain rows; ``layers`` says how many blocks of equal width D holds.

    Raises DatasetError for fewer than two rows.
    """
    if len(states) < 2:
        raise DatasetError("a gate space needs at least two retain rows")
    center = states.mean(0)
    z = states - center
    sizes = z.unflatten(1, (layers, -1)).norm(dim=-1).mean(0).clamp_min(1e-12)  # (L,)
    scale = sizes.reciprocal().repeat_interleave(z.shape[1] // layers)
    z = z * scale
    variance = z.pow(2).sum() / len(z)  # the trace of the covariance
    ridge = RIDGE * variance / z.shape[1] + 1e-12
    rank = min(MAX_RANK, *z.shape)
    if z.shape[0] < z.shape[1]:  # the smaller of the two Gram matrices
        values, vectors = torch.linalg.eigh(z @ z.T / len(z))
        values, vectors = values[-rank:].clamp_min(0), vectors[:, -rank:]
        basis = torch.nn.functional.normalize(z.T @ vectors, dim=0)
    else:
        values, basis = torch.linalg.eigh(z.T @ z / len(z))
        values, basis = values[-rank:].clamp_min(0), basis[:, -rank:]
    others = z.shape[1] - rank
    rest = (variance - values.sum()).clamp_min(0) / others if others else variance.new_zeros(())
    gain = ((rest + ridge) / (values + ridge)).sqrt() - 1
    return GateSpace(fingerprint, center, scale, basis.contiguous(), gain)


@dataclass(frozen=True, eq=False, repr=False)  # no repr: a gate is personal data
class Gate:
    """Claims a query whose point has a cosine above ``threshold`` with one of ``directions`` (c, D).

    A cosine above ``certain`` needs no prompt to decide; NEVER leaves every decision to the prompt.
    ``digests`` (n, 32) uint8: keyed digests of the normalised forget texts, for the guard. ``space``: digest of the
    GateSpace it was fitted in.
    """

    directions: Tensor
    threshold: float
    certain: float
    digests: Tensor
    space: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 hex of ``to_bytes()``."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        return save(
            {
                "directions": self.directions.contiguous(),
                "thresholds": torch.tensor([self.threshold, self.certain], dtype=torch.float64),
                "digests": self.digests.contiguous(),
                "space": torch.frombuffer(bytearray(bytes.fromhex(self.space)), dtype=torch.uint8),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, digest: str | None = None) -> Gate:
        """``digest``: as ``SoftPrompt.from_bytes`` has it. Raises InvalidGate."""
        tensors = _load(
            data,
            {
                "directions": (2, torch.float32),
                "thresholds": (1, torch.float64),
                "digests": (2, torch.uint8),
                "space": (1, torch.uint8),
            },
            digest,
        )
        sizes = len(tensors["thresholds"]), tensors["digests"].shape[1], len(tensors["space"])
        if sizes != (2, 32, 32) or not len(tensors["directions"]):
            raise InvalidGate("the shapes of a gate do not agree")
        threshold, certain = tensors["thresholds"].tolist()
        return cls(
            tensors["directions"], threshold, certain, tensors["digests"], bytes(tensors["space"].tolist()).hex()
        )


def best_cosines(points: Tensor, directions: Tensor) -> Tensor:
    """Score (N,) of points (N, D): the cosine with the nearest of directions (c, D)."""
    return cosines(points, directions).max(1).values


def cosines(points: Tensor, directions: Tensor) -> Tensor:
    """Scores (N, k) float32 of points (N, D) with directions (k, D), which are best in float64 already.

    Summed in float64: in float32 the last bits of a score depend on how many directions there are, and no text may be
    claimed or let go because another gate came or went.
    """
    return (points.double() @ directions.double().T).float()


def _load(data: bytes, kinds: dict[str, tuple[int, torch.dtype]], digest: str | None) -> dict[str, Tensor]:
    """Exactly these tensors, of these numbers of dimensions and types, and finite. Raises InvalidGate."""
    if not same_digest(data, digest):
        raise InvalidGate("altered: its digest is another one")
    try:
        tensors = load(data)
    except UNREADABLE as error:
        raise InvalidGate(f"not a safetensors file ({type(error).__name__})") from None
    if {name: (t.ndim, t.dtype) for name, t in tensors.items()} != kinds:
        raise InvalidGate("other tensors than those of a gate")
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        raise InvalidGate("non-finite numbers")
    return tensors
