"""What a batch takes, learned from those that ran: by its size, since a light one says little of a heavy one."""

from __future__ import annotations

NEW = 0.2  # of what is known comes from the newest batch
FALL = 8  # times slower at the most than was known: a batch that was too late for all of its callers


class Pace:
    """Weight per second, smoothed, of batches by their size. No thread may use it while another one does.

    Size 1 is more than half of ``max_batch``, size 2 more than a quarter, and so on. Of a size that has not been seen,
    the next heavier one that has been is known as well: a lighter batch is no quicker for its weight. Where there is
    none, a batch takes what the heaviest size that has been seen takes at the least, and without any nothing at all.

    So who asks for little in too little time teaches what so little takes, and no heavy call is refused for it: many
    texts may take hardly longer than one. A batch that is late for everybody makes the next one lighter, until one is
    in time. Where nobody was late the newest batch counts for a fifth; where all were, at once, but a single one makes
    what is known eight times slower at the most: it may have been a stall. A batch in time that is quicker than
    heavier ones are known to be counts for these, too.
    """

    def __init__(self, max_batch: int) -> None:
        self._max_batch = max_batch
        self._known: dict[int, float] = {}
        self._at_most: set[int] = set()  # sizes of which no batch has ended yet: it may be far less

    def seconds(self, weight: int) -> float:
        """What so much takes, in batches one after another; as far as is known no less."""
        full, rest = divmod(weight, self._max_batch)
        return full * self._batch(self._max_batch) + self._batch(rest)

    def learn(self, weight: int, seconds: float, *, late: bool, ended: bool = True) -> None:
        """Of a batch. ``late``: for all of its callers. Not ``ended``: it was given up, and would have taken longer."""
        size, found = self._size(weight), weight / max(seconds, 1e-6)
        known = self._pace(size)
        if known is None or (ended and size in self._at_most):
            self._known[size] = found
            (self._at_most.discard if ended else self._at_most.add)(size)
        elif not late:
            self._known[size] = (1 - NEW) * known + NEW * found
        elif found < known:
            self._known[size] = max(found, known / FALL)
        if not late:
            for heavier, pace in self._known.items():
                if heavier < size and pace < found:
                    self._known[heavier] = (1 - NEW) * pace + NEW * found

    def _size(self, weight: int) -> int:
        return max(1, (self._max_batch // weight).bit_length())

    def _pace(self, size: int) -> float | None:
        return next((self._known[s] for s in range(size, 0, -1) if s in self._known), None)

    def _batch(self, weight: int) -> float:
        if not weight:
            return 0.0
        size = self._size(weight)
        pace = self._pace(size)
        if pace is not None:
            return weight / pace
        if not self._known:
            return 0.0
        lighter = min(self._known)  # the heaviest that is known; all are lighter than this one
        return ((self._max_batch >> lighter) + 1) / self._known[lighter]
