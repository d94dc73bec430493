"""Make the synchronous client of the asynchronous one: ``python client/make_sync.py``. A test holds it to that."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent / "letheon_client"
MODULES = {"_async_transport.py": "_transport.py", "_async_client.py": "_client.py"}
_REPLACED = (
    (r"\basync (def|for|with)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\b_async_", "_"),
    (r"\bAsync(Iterator|Generator|Transport|Letheon)\b", r"\1"),
    (r"\bhttpx2\.AsyncClient\b", "httpx2.Client"),
    (r"\b__a(enter|exit)__\b", r"__\1__"),
    (r"\ba(close|closing|read|iter_bytes|iter_text)\b", r"\1"),
    (r"\bfrom asyncio import sleep\b", "from time import sleep"),
)


def synchronous(source: str, name: str) -> str:
    """The text of the module of this name."""
    _, _, code = source.removeprefix('"""').partition('"""\n')  # without the docstring
    for pattern, replacement in _REPLACED:
        code = re.sub(pattern, replacement, code)
    text = f'"""Made of {name} by ``python client/make_sync.py``: change that one."""\n{code}'
    for command in (["check", "--select", "I,UP028", "--fix", "--unsafe-fixes"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--quiet", "--stdin-filename", str(PACKAGE / MODULES[name])]
        text = subprocess.run([*ruff, "-"], input=text, capture_output=True, text=True, check=True).stdout
    return text


def main() -> None:
    for name, made in MODULES.items():
        (PACKAGE / made).write_text(synchronous((PACKAGE / name).read_text(), name))


if __name__ == "__main__":
    main()
