"""A dataset of sentiment as an unlearning task: ``python -m bench.split SOURCE --category NAME --out DIR``.

SOURCE is a file (.jsonl, .csv, .tsv, also .gz, or .parquet) or a hub's dataset id. What is to be forgotten is either
every row of one category, as the SPUL paper does with Yelp, or every row whose text matches (``--matching REGEX``), as
it does with the names in SST-2; all others are retained, and a fifth of either is held out. Writes the four files that
``bench.quality --data DIR`` reads. Labels are negative and positive, or 0 and 1.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from bench.tuned import LABELS, write
from models.errors import DatasetError
from models.examples import Example, read_rows

HELD_OUT = 0.2


def split(rows: Sequence[tuple[Example, bool]], *, max_words: int | None, seed: int) -> dict[str, list[Example]]:
    """Rows, each with whether it is to be forgotten, by file name, in a seeded order.

    Longer ones are left out; of a text that is listed twice one row is kept, the one to forget if there is one.
    """
    short = [(row, forget) for row, forget in rows if max_words is None or len(row.text.split()) <= max_words]
    kept = {row.text: (row, forget) for row, forget in sorted(short, key=lambda pair: pair[1])}.values()
    out: dict[str, list[Example]] = {}
    for side, wanted in (("forget", True), ("retain", False)):
        found = [row for row, forget in kept if forget == wanted]
        random.Random(seed).shuffle(found)
        held_out = max(1, round(HELD_OUT * len(found)))
        out[f"test_{side}"], out[f"train_{side}"] = found[:held_out], found[held_out:]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a file, or a hub's dataset id")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--category", help="the value of --field of the rows to forget")
    which.add_argument("--matching", help="a regular expression, found anywhere in the texts to forget, in any case")
    parser.add_argument("--field", default="category")
    parser.add_argument("--split", default="train", help="of a hub's dataset")
    parser.add_argument("--max-words", type=int, help="leave longer texts out: two cores train with them for hours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        rows = read_rows(args.source, split=args.split, labels=LABELS)
        pattern = None if args.matching is None else re.compile(args.matching, re.IGNORECASE)
    except DatasetError as error:
        raise SystemExit(str(error)) from None
    except re.error as error:
        raise SystemExit(f"--matching: {error}") from None
    if any(example.label is None for example, _ in rows):
        raise SystemExit(f"{args.source}: every row needs a label")
    if pattern is not None:
        marked = [(example, pattern.search(example.text) is not None) for example, _ in rows]
    else:
        marked = [(example, args.field in row and str(row[args.field]) == args.category) for example, row in rows]
    if not any(forget for _, forget in marked):
        names = sorted({str(row.get(args.field)) for _, row in rows})
        known = "" if pattern is not None else f"; of {args.field} there are {', '.join(names[:30])}"
        raise SystemExit(f"{args.source}: no row to forget{known}")
    files = split(marked, max_words=args.max_words, seed=args.seed)
    if not all(files.values()):
        raise SystemExit(f"{args.source}: too few rows, { ({name: len(found) for name, found in files.items()}) }")
    for name, found in files.items():
        lines_out = "".join(json.dumps({"text": r.text, "label": r.label}) + "\n" for r in found)
        write(args.out / f"{name}.jsonl.gz", gzip.compress(lines_out.encode(), mtime=0))
        print(f"{args.out / name}.jsonl.gz: {len(found)} rows")


if __name__ == "__main__":
    main()
