"""What a prompt of mode ``routed`` is trained with: the retain rows that its gate would claim first.

Such a prompt only ever meets queries that its gate claims. So it learns to tell the forget texts from those rows and
nothing about all the others: few steps do, however large the retain set is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from models.examples import Example
from models.gate import GateSpace
from models.gate_fit import fit_gate
from models.gate_rows import GateRows
from models.llm import FrozenLLM
from models.text_states import text_states
from models.training import TrainingConfig

ROUTED_TRAINING = TrainingConfig(
    alpha=0.3, forget_batch=4, retain_batch=4, min_steps=60, check_every=30, check_rows=32, max_doublings=2
)
"""Defaults of mode ``routed``; the reasons are in docs/decisions/0009."""
MIXED_EPOCHS = 12
"""Of the forget texts, at least, where they are on several subjects; docs/decisions/0009."""
NEAR_ROWS = 256


@dataclass(frozen=True, repr=False)
class Surroundings:
    """``forget`` (n) with its ``states`` (n, D), the retain rows to train on, and states (N, D) to calibrate with.

    ``check``: the rows of the checks, with ``check_states`` (N, D). ``own_recall``: of the forget texts, what a gate
    can reach at all, and ``subjects``: the directions that it takes.
    """

    forget: Sequence[Example]
    states: Tensor
    near: list[Example]
    calibration_states: Tensor
    check: list[Example]
    check_states: Tensor
    space: GateSpace
    own_recall: float
    subjects: int


def look_around(
    llm: FrozenLLM, rows: GateRows, space: GateSpace, forget: Sequence[Example], *, max_false_claims: float
) -> Surroundings:
    """Deterministic in its arguments. Raises TextTooLong."""
    states = text_states(llm, [e.text for e in forget])
    calibration = rows.states(rows.calibration_rows)
    alone = fit_gate(states, calibration, space, digests=[], max_false_claims=max_false_claims)
    return Surroundings(
        forget=forget,
        states=states,
        near=[rows.retain[i] for i in rows.nearest(space, alone.gate.directions, NEAR_ROWS)],
        calibration_states=calibration,
        check=[rows.retain[i] for i in rows.check_rows],
        check_states=rows.states(rows.check_rows),
        space=space,
        own_recall=alone.own_recall,
        subjects=len(alone.gate.directions),
    )
