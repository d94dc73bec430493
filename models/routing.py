"""Routed classification: the gates propose, the prompts decide, and no two prompts ever share a context.

The base pass answers every query and is what the gates read. A query that no gate claims keeps that answer, bit for
bit. A claimed one runs again behind each claiming request's prompt alone; when any of them abstains so does the
service, and when none does the base model's answer stands. So adding or revoking a request cannot change the outcome
of a query that it does not claim, and the cost of an unclaimed query does not grow with the number of requests.

A prompt can learn its texts by heart; a gate, which has nothing to learn by heart, knows their subject. So a gate
decides alone where it is certain (``Gate.certain``), and its prompt in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.errors import FingerprintMismatch, InvalidGate, NotFinite
from models.gate import Gate, GateSpace, cosines
from models.inference import BATCH, Classification, Classifier, Encoded, answer_scores
from models.soft_prompt import SoftPrompt
from models.template import ABSTAIN

Digest = Callable[[str], bytes]


@dataclass(frozen=True, eq=False, repr=False)
class Route:
    """One request in force."""

    prompt: SoftPrompt
    gate: Gate


@dataclass(frozen=True)
class Routed:
    """An answer and how it came about. ``base``: the bare model's.

    ``claims``: routes whose gates claim the query, best margin first. ``guarded``: the query is one of the forget
    texts; ``certain``: a gate that may was sure of it. Either way no prompt had a say in the answer.
    """

    answer: Classification
    base: Classification
    claims: tuple[int, ...]
    guarded: bool
    certain: bool


@dataclass(frozen=True, eq=False, repr=False)
class _Block:
    """The gates of one space: ``directions`` (C, D) of the routes ``indices``, of which ``owners`` (C,) says which.

    ``near``: the space where the directions are.
    """

    space: GateSpace
    near: GateSpace
    indices: list[int]
    directions: Tensor
    owners: Tensor

    def scores(self, points: Tensor) -> Tensor:
        """(N, gates) float64 on the CPU: the cosine of each point with the nearest direction of each gate."""
        found = cosines(points, self.directions).double().cpu()
        if len(self.indices) == len(self.owners):
            return found
        best = torch.full((len(points), len(self.indices)), -torch.inf, dtype=torch.float64)
        return best.scatter_reduce_(1, self.owners.expand_as(found), found, "amax")

    def scores_of(self, states: Tensor) -> Tensor:
        """(N, gates) float64 on the CPU: ``scores`` of the points of states (N, D)."""
        return self.scores(self.near.points(states.to(self.directions.device)))


class Routes:
    """The gates of an active set, side by side. Immutable; index i is ``routes[i]``."""

    def __init__(
        self,
        routes: Sequence[Route],
        spaces: Mapping[str, GateSpace],
        *,
        fingerprint: str,
        device: torch.device | str = "cpu",
    ) -> None:
        """``spaces`` by digest. ``device``: where gates are scored, the model's where many are in force.

        Raises FingerprintMismatch, InvalidGate (a space is missing or of another width).
        """
        self.routes = tuple(routes)
        self._device = torch.device(device)
        for found in (*(r.prompt.fingerprint for r in routes), *(s.fingerprint for s in spaces.values())):
            if found != fingerprint:
                raise FingerprintMismatch(f"made for model {found[:12]}, but this model is {fingerprint[:12]}")
        # Usually one space; another one after the retain set was changed.
        members: dict[str, list[int]] = {}
        for index, route in enumerate(routes):
            members.setdefault(route.gate.space, []).append(index)
        self._blocks: list[_Block] = []
        for digest, indices in members.items():
            if digest not in spaces:
                raise InvalidGate(f"the gate space {digest[:12]} is not there")
            gates = [routes[i].gate for i in indices]
            if any(gate.directions.shape[1] != len(spaces[digest].center) for gate in gates):
                raise InvalidGate(f"a gate is not of the width of its space {digest[:12]}")
            directions = torch.cat([gate.directions for gate in gates]).to(self._device).double()
            counts = torch.tensor([len(gate.directions) for gate in gates])
            owners = torch.arange(len(gates)).repeat_interleave(counts)
            near = spaces[digest].to(self._device)
            self._blocks.append(_Block(spaces[digest], near, indices, directions, owners))
        self._thresholds = torch.tensor([r.gate.threshold for r in routes], dtype=torch.float64)
        self._certain = torch.tensor([r.gate.certain for r in routes], dtype=torch.float64) - self._thresholds
        self._by_digest: dict[bytes, list[int]] = {}
        for index, route in enumerate(routes):
            for row in route.gate.digests.numpy():
                self._by_digest.setdefault(row.tobytes(), []).append(index)

    def plus(self, route: Route, space: GateSpace) -> Routes:
        """These and one more, last. ``space`` is the new gate's."""
        spaces = {**self.spaces, space.digest: space}
        return Routes([*self.routes, route], spaces, fingerprint=route.prompt.fingerprint, device=self._device)

    @property
    def spaces(self) -> dict[str, GateSpace]:
        """Those that the gates need, by digest."""
        return {block.space.digest: block.space for block in self._blocks}

    def __len__(self) -> int:
        return len(self.routes)

    def margins(self, states: Tensor) -> Tensor:
        """Score minus threshold, (N, k) float64; a gate claims where it is positive. ``states``: (N, D).

        Raises NotFinite for such states: no gate would claim them, and the prompts would be left out.
        """
        if not bool(torch.isfinite(states).all()):
            raise NotFinite("the model's hidden states are not finite")
        out = torch.empty(len(states), len(self.routes), dtype=torch.float64)
        for block in self._blocks:
            out[:, block.indices] = block.scores_of(states)
        return out - self._thresholds

    def margins_of_directions(self) -> tuple[Tensor, Tensor]:
        """Each gate's own directions as queries: their owners (C,) and margins (C, k); -inf across spaces."""
        owners, rows = [], []
        for block in self._blocks:
            margins = torch.full((len(block.owners), len(self.routes)), -torch.inf, dtype=torch.float64)
            margins[:, block.indices] = block.scores(block.directions)
            owners.append(torch.tensor(block.indices)[block.owners])
            rows.append(margins - self._thresholds)
        return torch.cat(owners), torch.cat(rows)

    def known_by(self, digest: bytes) -> Sequence[int]:
        """The routes of which a text with this keyed digest is a forget text."""
        return self._by_digest.get(digest, ())

    def sure(self, margins: Tensor) -> Tensor:
        """Which gates claim a query and are sure enough to decide alone, (N, k) bool. ``margins``: (N, k)."""
        return (margins > 0) & (margins > self._certain)

    def certain(self, margins: Tensor) -> list[bool]:
        """Per query whether any gate is ``sure``."""
        certain: list[bool] = self.sure(margins).any(1).tolist()
        return certain

    def claims(self, margins: Tensor, max_prompts: int) -> list[tuple[int, ...]]:
        """Per query the routes that claim it, best margin first, at most ``max_prompts``. ``margins``: (N, k)."""
        found: list[tuple[int, ...]] = [()] * len(margins)
        for row in (margins > 0).any(1).nonzero().flatten().tolist():
            order = margins[row].argsort(descending=True, stable=True)[:max_prompts].tolist()
            found[row] = tuple(i for i in order if margins[row, i] > 0)
        return found


def classify_routed(
    classifier: Classifier,
    routes: Routes,
    texts: Sequence[str | Encoded],
    *,
    digest: Digest | None,
    max_prompts: int,
    batch_size: int = BATCH,
) -> list[Routed]:
    """Answers in the order of ``texts``. ``digest``: the keyed digest of a text that brings none of its own; None
    leaves the guard out for it.

    Raises TextTooLong, FingerprintMismatch, NotFinite.
    """
    llm = classifier.llm
    hidden, states = classifier.base_pass(texts, batch_size=batch_size)
    base = classifier.answers(answer_scores(llm, hidden))
    if not len(routes):
        return [Routed(answer, answer, (), False, False) for answer in base]
    digests = [_digest(text, digest) for text in texts]
    known: list[Sequence[int]] = [() if own is None else routes.known_by(own) for own in digests]
    margins = routes.margins(states)
    claims, sure, certain = routes.claims(margins, max_prompts), routes.sure(margins), routes.certain(margins)
    # One prompt at a time, and a query is left out only where the prompt's own gate decides without it: no other
    # request has a say in the shape of its batches, on which the last bits of an answer depend.
    asked: dict[int, list[int]] = {}  # route → queries
    for query, found in enumerate(claims):
        for route in found:
            if route not in known[query] and not sure[query, route]:
                asked.setdefault(route, []).append(query)
    answers: dict[int, list[Classification]] = {}
    # First those whose keys and values are there: where not all have room, the others would push them out in turn.
    for route in sorted(asked, key=lambda route: not classifier.has_prefix([routes.routes[route].prompt])):
        own = [texts[query] for query in asked[route]]
        answers[route] = classifier.classify(own, [routes.routes[route].prompt], batch_size=batch_size)
    abstained: dict[int, Classification] = {}
    for route, queries in asked.items():
        for query, answer in zip(queries, answers[route], strict=True):
            best = abstained.get(query)
            if answer.abstained and (best is None or answer.confidence > best.confidence):
                abstained[query] = answer
    unknown = Classification(ABSTAIN, True, {**dict.fromkeys(llm.verbalizer.labels, 0.0), ABSTAIN: 1.0})
    return [
        Routed(
            unknown if known[q] or certain[q] else abstained.get(q, base[q]),
            base[q],
            claims[q],
            bool(known[q]),
            certain[q],
        )
        for q in range(len(texts))
    ]


def _digest(text: str | Encoded, digest: Digest | None) -> bytes | None:
    if isinstance(text, Encoded):
        return text.digest
    return None if digest is None else digest(text)
