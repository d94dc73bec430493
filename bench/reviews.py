"""Reviews as an unlearning task, one category to forget: ``python -m bench.reviews FILE --category NAME --out DIR``.

As the SPUL paper does with Yelp: the category's reviews are the forget set, all others are retained, and a fifth of
either is held out. Writes the four files that ``bench.quality --data DIR`` reads.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path
from typing import Any

from bench.tuned import write

HELD_OUT = 0.2


def split(rows: list[dict[str, Any]], category: str, *, max_words: int | None, seed: int) -> dict[str, list[Any]]:
    """Rows with ``text``, ``label`` and ``category`` by file name, in a seeded order.

    Longer ones are left out; of a text that is listed twice one row is kept, the one to forget if there is one.
    """
    short = [row for row in rows if max_words is None or len(row["text"].split()) <= max_words]
    forget_last = sorted(short, key=lambda row: row["category"] == category)
    kept = {row["text"]: row for row in forget_last}.values()
    out: dict[str, list[Any]] = {}
    for side, wanted in (("forget", True), ("retain", False)):
        found = [row for row in kept if (row["category"] == category) == wanted]
        random.Random(seed).shuffle(found)
        held_out = round(HELD_OUT * len(found))
        out[f"test_{side}"], out[f"train_{side}"] = found[:held_out], found[held_out:]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help=".jsonl.gz with text, label, category")
    parser.add_argument("--category", required=True)
    parser.add_argument("--max-words", type=int, help="leave longer reviews out: two cores train with them for hours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with gzip.open(args.file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if not any(row["category"] == args.category for row in rows):
        names = ", ".join(sorted({row["category"] for row in rows}))
        raise SystemExit(f"no review of category {args.category!r}; there are {names}")
    for name, found in split(rows, args.category, max_words=args.max_words, seed=args.seed).items():
        lines_out = "".join(json.dumps({"text": r["text"], "label": r["label"]}) + "\n" for r in found)
        write(args.out / f"{name}.jsonl.gz", gzip.compress(lines_out.encode(), mtime=0))
        print(f"{args.out / name}.jsonl.gz: {len(found)} rows")


if __name__ == "__main__":
    main()
