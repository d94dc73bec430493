"""Small zip files of known names: what an export is sent as, and what is taken of one that comes from elsewhere."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping

from app.errors import InvalidInput

_FIRST = (1980, 1, 1, 0, 0, 0)  # no time: the same files are the same bytes
_MAX_ENTRIES = 64
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, NotImplementedError)


def pack(files: Mapping[str, bytes]) -> bytes:
    """Stored, not compressed: tensors do not shrink."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, _FIRST), data)
    return buffer.getvalue()


def unpack(data: bytes, limits: Mapping[str, int]) -> dict[str, bytes]:
    """The files of these names that are there, each of so many bytes at most; others are not looked at.

    No more is unpacked than the limits allow, whatever the headers say, and nothing is written. Raises InvalidInput.
    """
    found: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if len(entries) > _MAX_ENTRIES:
                raise InvalidInput(f"the zip file has more than {_MAX_ENTRIES} entries")
            for entry in entries:
                limit = limits.get(entry.filename)
                if limit is None:
                    continue
                if entry.filename in found:
                    raise InvalidInput(f"the zip file has {entry.filename} twice")
                if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise InvalidInput(f"{entry.filename} is packed in a way that is not taken")
                with archive.open(entry) as file:
                    found[entry.filename] = file.read(limit + 1)
                if len(found[entry.filename]) > limit:
                    raise InvalidInput(f"{entry.filename} has more than {limit} bytes")
    except _DAMAGED as error:
        raise InvalidInput(f"not a zip file that can be read ({type(error).__name__})") from None
    return found
