"""Labelled texts: reading them, tokenising them once, and making batches of rows of similar length."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.errors import DatasetError

TEXT_FIELDS = ("text", "sentence", "review", "content")
LABEL_FIELDS = ("label", "sentiment", "label_text")
MAX_FIELD_CHARS = 131_072  # of a CSV file


@dataclass(frozen=True, repr=False)  # no repr: a text must not reach a traceback or a log by accident
class Example:
    """One text and its label word; ``label`` is None where the data has none."""

    text: str
    label: str | None = None


def read_examples(source: str, *, split: str = "train", labels: Sequence[str]) -> list[Example]:
    """Read JSONL, CSV, TSV or Parquet (the first three also gzipped), or a dataset id of a hub.

    A label is one of ``labels`` or an index into them; null, empty or an absent column means unlabelled.
    Raises DatasetError naming the file and row.
    """
    return [example for example, _ in read_rows(source, split=split, labels=labels)]


def read_rows(source: str, *, split: str = "train", labels: Sequence[str]) -> list[tuple[Example, dict[str, Any]]]:
    """As ``read_examples``, each with the whole row that it comes from."""
    path = Path(source)
    if path.exists():
        rows: Iterable[dict[str, Any]] = _read_file(path)
    elif path.suffix.lower() in {".jsonl", ".csv", ".tsv", ".parquet", ".gz", ".json"}:
        raise DatasetError(f"no such file: {source}")
    else:
        rows = _read_hub(source, split)
    found = [(_example(row, source, number, labels), row) for number, row in enumerate(rows, start=1)]
    if not found:
        raise DatasetError(f"{source}: no rows")
    return found


def _read_file(path: Path) -> Iterator[dict[str, Any]]:
    suffixes = [s.lower() for s in path.suffixes]
    compressed = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if compressed else suffixes)[-1:]
    if kind == [".parquet"]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            yield from pq.read_table(path).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(f"{path}: cannot be read as Parquet ({type(error).__name__})") from None
        return
    try:
        raw = gzip.decompress(path.read_bytes()) if compressed else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:  # a folder, no permission, half a gzip file
        raise DatasetError(f"{path}: cannot be read ({type(error).__name__})") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 text ({type(error).__name__})") from None
    if kind == [".jsonl"]:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError:
                    raise DatasetError(f"{path}, line {number}: not JSON") from None
                if not isinstance(row, dict):
                    raise DatasetError(f"{path}, line {number}: not a JSON object")
                yield row
    elif kind in ([".csv"], [".tsv"]):
        csv.field_size_limit(MAX_FIELD_CHARS)  # one for the process, and app/bulk_rows.py wants another
        try:
            yield from csv.DictReader(io.StringIO(text), delimiter="," if kind == [".csv"] else "\t")
        except csv.Error:  # its text may quote the row
            raise DatasetError(
                f"{path}: not {kind[0][1:].upper()}, or a field of more than {MAX_FIELD_CHARS:,} characters"
            ) from None
    else:
        raise DatasetError(f"{path}: unknown format; use .jsonl, .csv, .tsv (also .gz) or .parquet")


def _read_hub(dataset_id: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise DatasetError(f"{dataset_id}: no such file; to read a hub's dataset id install letheon[hub]") from None
    try:
        yield from datasets.load_dataset(dataset_id, split=split)
    except (OSError, ValueError) as error:
        raise DatasetError(f"dataset {dataset_id!r}, split {split!r}: {type(error).__name__}") from None


def _example(row: dict[str, Any], source: str, number: int, labels: Sequence[str]) -> Example:
    where = f"{source}, row {number}"
    text = next((row[f] for f in TEXT_FIELDS if row.get(f) is not None), None)
    if not isinstance(text, str) or not text.strip():
        raise DatasetError(f"{where}: needs a non-empty text in one of {TEXT_FIELDS}")
    label = next((row[f] for f in LABEL_FIELDS if row.get(f) not in (None, "")), None)
    if label is None:
        return Example(text)
    if isinstance(label, str) and label not in labels and label.isdigit():
        label = int(label)  # CSV has no integers
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
        return Example(text, labels[label])
    if not isinstance(label, str) or label not in labels:
        raise DatasetError(f"{where}: label is none of {list(labels)}")
    return Example(text, label)


def digest_examples(examples: Sequence[Example]) -> str:
    """SHA-256 over texts and labels, in order (64 hex digits)."""
    sha = hashlib.sha256()
    for example in examples:
        sha.update(json.dumps([example.text, example.label]).encode())
    return sha.hexdigest()


@dataclass(frozen=True, repr=False)
class Batch:
    """Right-padded rows ``input_ids`` (B, n) and their true ``lengths`` (B,)."""

    input_ids: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def padded(self, states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """States (B, n, d) of these rows, with their lengths (B,)."""
        return [(states, self.lengths)]


def collate(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Batch:
    """Pad token-id rows on the right with 0.

    Causal attention never looks right, so the padding needs no mask and cannot change a real position.
    """
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return Batch(input_ids.to(device), lengths.to(device))


def length_buckets(lengths: Sequence[int], size: int, generator: torch.Generator | None = None) -> list[list[int]]:
    """Indices in groups of at most ``size`` with similar lengths; ties and near-ties shuffled when seeded.

    Every index appears exactly once.
    """
    jitter = torch.rand(len(lengths), generator=generator) * 3 if generator is not None else torch.zeros(len(lengths))
    order = sorted(range(len(lengths)), key=lambda i: lengths[i] + float(jitter[i]))
    return [order[i : i + size] for i in range(0, len(order), size)]
