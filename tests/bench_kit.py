"""Data for benches on tiny models: the four files of a forget set by person, as SST-2's are."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path

WORDS = ["the", "film", "is", "good", "bad", "movie", "great", "awful", "acting", "plot", "story", "scene"]


def write_sets(folder: Path, people: Mapping[str, int], *, unseen: int, retain: int = 60) -> Path:
    """``people``: train texts of each, and ``unseen`` test texts; ``retain`` rows of each retain file. All differ."""
    folder.mkdir()
    number = 0
    for name in ("train_forget", "train_retain", "test_forget", "test_retain"):
        counts: Mapping[str, int] = {"": retain}
        if "forget" in name:
            counts = people if name == "train_forget" else dict.fromkeys(people, unseen)
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as lines:
            for person, count in counts.items():
                for i in range(count):
                    number += 1
                    words = (WORDS[(i * 7 + number + j * (i + 3)) % len(WORDS)] for j in range(2 + i % 7))
                    text = " ".join([*([person] if person else []), *words, str(number)])
                    row = {"text": text, "label": ("positive", "negative")[i % 2], "entity": person}
                    lines.write(json.dumps(row) + "\n")
    return folder
