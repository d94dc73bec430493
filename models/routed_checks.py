"""Checks of a whole active set of routes before a new one joins it: what would be served, measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from models.errors import DatasetError
from models.evaluation import CheckLimits, retain_figures, stratified
from models.examples import Example
from models.gate_fit import GateFit
from models.inference import Classification, Classifier
from models.neighbours import how_many, neighbour_figures
from models.routing import Routed, Routes, classify_routed

MIN_REACH = 0.5  # of other texts on the same subject, as estimated: below that the report warns


@dataclass(frozen=True)
class RoutedLimits:
    """``checks`` as for a stack; of the check rows all gates together may claim ``max_total_claims``."""

    checks: CheckLimits
    max_total_claims: float
    max_prompts: int


@dataclass(frozen=True)
class RoutedReport:
    """``violations`` and ``missed`` (``models.self_tuning.Missed``) are empty exactly when ``passed``.

    They are about what would be served. ``warnings``: the prompt alone knows fewer of its texts than asked for; where
    the request passes all the same, its gate decides for it. Or the request is too small, or too mixed, to reach other
    texts on its subject. Rates are fractions of rows, accuracies over labels + generic.

    ``forget_abstain``: by this request's own gate and prompt, beside the others and without them, and without the guard
    that knows the forget texts by their digests. ``prompt_abstain``: by the prompt alone, whatever the gate says.
    ``unseen_claimed`` and ``unseen_certain``: see ``GateFit``; what is served lies between the two. ``unseen_rows``: of
    how many of the forget texts they are.
    ``false_claim_rate`` is this gate's, ``total_claim_rate`` the whole set's, on rows that set no threshold;
    ``false_abstain_rate``: of those rows, the share that this request alone would answer ``unknown``.
    ``neighbour_…``: of those rows, none of which the prompt has seen either, the ones that this request's gate would
    claim first. ``prompt_norm``: the largest row of the prompt in ``FrozenLLM.word_norm``, and the mean.
    ``lost_canaries``: earlier requests whose gate's own directions would no longer reach their prompt.
    """

    forget_abstain: float
    forget_abstain_before: float
    prompt_abstain: float
    gate_recall: float
    unseen_claimed: float | None
    unseen_certain: float | None
    unseen_rows: int
    false_claim_rate: float
    false_abstain_rate: float
    total_claim_rate: float
    check_rows: int
    retain_accuracy: float
    retain_accuracy_before: float
    per_class: dict[str, dict[str, float]]
    retain_rows: int
    neighbour_rows: int
    neighbour_accuracy: float
    neighbour_accuracy_before: float
    neighbour_abstain: float
    prompt_norm: float
    prompt_norm_mean: float
    lost_canaries: int
    active_requests: int
    passed: bool
    violations: list[str]
    warnings: list[str]
    missed: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_routes(
    classifier: Classifier,
    others: Routes,
    routes: Routes,
    fit: GateFit,
    forget: Sequence[Example],
    rows: Sequence[Example],
    states: Tensor,
    *,
    max_retain_rows: int,
    seed: int,
    limits: RoutedLimits,
) -> RoutedReport:
    """``routes`` is ``others`` and, last, the request in question, whose gate ``fit`` describes.

    ``rows``: retain rows with ``states`` (N, D) that neither space, thresholds nor prompt have seen. Raises
    DatasetError when a side is empty, TextTooLong.
    """
    if not forget or not rows:
        raise DatasetError("checks need at least one forget row and one retain row")
    last = len(routes) - 1

    def answers(texts: Sequence[str]) -> list[Routed]:
        return classify_routed(classifier, routes, texts, digest=None, max_prompts=limits.max_prompts)

    alone = Routes(routes.routes[last:], routes.spaces, fingerprint=classifier.llm.fingerprint)

    def answers_alone(texts: Sequence[str]) -> list[Routed]:
        return classify_routed(classifier, alone, texts, digest=None, max_prompts=limits.max_prompts)

    # Both: another request's prompt may push this one out, and must not stand in for it, since it may be revoked.
    asked, asked_alone = answers([e.text for e in forget]), answers_alone([e.text for e in forget])
    sample, weights = stratified(rows, max_retain_rows, seed)
    retained = answers([e.text for e in sample])
    figures = retain_figures(sample, weights, [r.base for r in retained], [r.answer for r in retained])

    margins = routes.margins(states)
    claimed = (margins[:, last] > 0).nonzero().flatten().tolist()
    false_abstain = sum(found.answer.abstained for found in answers_alone([rows[i].text for i in claimed]))
    total = int((margins > 0).any(1).sum()) / len(rows)
    order = margins[:, last].argsort(descending=True, stable=True)
    neighbours = [rows[i] for i in order[: how_many(len(rows))].tolist()]
    beside = answers([e.text for e in neighbours])
    near = neighbour_figures(neighbours, [r.base for r in beside], [r.answer for r in beside])
    norm, mean_norm = routes.routes[last].prompt.norms(classifier.llm.word_norm)
    prompted = classifier.classify([e.text for e in forget], [routes.routes[last].prompt])
    prompt_abstain = sum(answer.abstained for answer in prompted) / len(forget)
    both = [a.answer.abstained and b.answer.abstained for a, b in zip(asked, asked_alone, strict=True)]
    abstain = sum(both) / len(forget)
    lost = lost_canaries(others, routes, limits.max_prompts)

    checks = limits.checks
    found: dict[str, list[str]] = {"forget": [], "retain": [], "norm": checks.norm_violations(norm), "set": []}
    if abstain < checks.min_forget_abstain:
        found["forget"].append(f"forget abstain rate {abstain:.4f} is below {checks.min_forget_abstain}")
    warnings = []
    if prompt_abstain < checks.min_forget_abstain:
        warnings.append(
            f"the prompt's own forget abstain rate {prompt_abstain:.4f} is below {checks.min_forget_abstain}"
        )
    warnings += reach_warnings(fit)

    def mended(found: Sequence[Routed]) -> list[Classification]:
        """Another training mends what this prompt turned away, not what its gate is certain of or others used up."""
        own = [last in r.claims and r.answer.abstained and not r.certain for r in found]
        return [r.base if mine else r.answer for r, mine in zip(found, own, strict=True)]

    without = retain_figures(sample, weights, [r.base for r in retained], mended(retained))
    found["set" if without.violations(checks) else "retain"] += figures.violations(checks)
    limit = checks.max_neighbour_drop
    near_without = neighbour_figures(neighbours, [r.base for r in beside], mended(beside))
    found["set" if near_without.violations(limit) else "retain"] += near.violations(limit)
    if total > max(limits.max_total_claims, 1 / len(rows)) + 1e-9:  # one row is no evidence
        found["set"].append(f"the gates claim {total:.4f} of the retain rows, more than {limits.max_total_claims}")
    if lost:
        found["set"].append(f"{lost} earlier requests would no longer be reached by their own texts")
    violations = [violation for part in found.values() for violation in part]
    return RoutedReport(
        forget_abstain=abstain,
        forget_abstain_before=sum(r.base.abstained for r in asked) / len(forget),
        prompt_abstain=prompt_abstain,
        gate_recall=fit.own_recall,
        unseen_claimed=fit.unseen_claimed,
        unseen_certain=fit.unseen_certain,
        unseen_rows=fit.unseen_rows,
        false_claim_rate=len(claimed) / len(rows),
        false_abstain_rate=false_abstain / len(rows),
        total_claim_rate=total,
        check_rows=len(rows),
        retain_accuracy=figures.after,
        retain_accuracy_before=figures.before,
        per_class=figures.per_class,
        retain_rows=figures.rows,
        neighbour_rows=near.rows,
        neighbour_accuracy=near.after,
        neighbour_accuracy_before=near.before,
        neighbour_abstain=near.abstain,
        prompt_norm=norm,
        prompt_norm_mean=mean_norm,
        lost_canaries=lost,
        active_requests=len(routes),
        passed=not violations,
        violations=violations,
        warnings=warnings,
        missed=[name for name, part in found.items() if part],
    )


def reach_warnings(fit: GateFit) -> list[str]:
    """What a gate says of a request that is too small, or too mixed, to reach other texts on its subject."""
    if fit.unseen_claimed is None:
        return ["too few different texts to tell how many others on their subject would be found"]
    if fit.unseen_claimed < MIN_REACH:
        return [
            f"of other texts on the same subject only {fit.unseen_claimed:.0%} are likely to be found: the texts have "
            "little in common, or are too few"
        ]
    return []


def lost_canaries(before: Routes, after: Routes, max_prompts: int) -> int:
    """How many routes of ``before`` reached their prompt then and would not now, or not with all they stand for.

    The forget texts of earlier requests are destroyed; what stands for them is each gate's own directions, as if they
    were queries. Under the cap on prompts per query a new gate can push an older one out. ``after`` is ``before`` and
    more, at the end.
    """
    if not len(before):
        return 0
    owners, margins = after.margins_of_directions()
    old = len(before)
    rows = ((margins[:, old:] > 0).any(1) & (owners < old)).nonzero().flatten()  # nothing else can have changed
    owners, margins = owners[rows], margins[rows]
    then = before.claims(margins[:, :old], max_prompts)
    now, certain = after.claims(margins, max_prompts), after.certain(margins)
    lost = {
        owner
        for owner, a, b, sure in zip(owners.tolist(), then, now, certain, strict=True)
        if owner in a and owner not in b and not sure
    }
    return len(lost)
