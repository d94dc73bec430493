"""Forms: read into memory, never onto a disk, and checked by the models that the API's bodies are checked by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from app.deps import ServiceDep
from app.errors import ClientGone, MalformedBody

MAX_FIELDS = 4000

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, repr=False)  # no repr: what people type must not reach a log by accident
class Sent:
    """A form that was sent: its fields, and the name and bytes of a file that was chosen."""

    fields: Mapping[str, Sequence[str]]
    file: tuple[str, bytes] | None = None

    def one(self, name: str) -> str:
        """A field, with line ends as ``\\n``; empty where there is none."""
        return next(iter(self.all(name)), "")

    def all(self, name: str) -> list[str]:
        return [value.replace("\r\n", "\n") for value in self.fields.get(name, ())]


async def _form(request: Request, service: ServiceDep) -> Sent:
    """Raises MalformedBody, ClientGone, and what the body's limits raise."""
    most = service.settings.max_body_bytes
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    # The parser would decode by whatever codec a client names: some take minutes for a few hundred kilobytes.
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise MalformedBody("the form is not in UTF-8")
    parser: MultiPartParser | FormParser
    if kind == b"multipart/form-data":
        parser = MultiPartParser(
            request.headers, request.stream(), max_files=1, max_fields=MAX_FIELDS, max_part_size=most
        )
        parser.spool_max_size = most + 1  # else forget texts would reach a temporary file
    elif kind == b"application/x-www-form-urlencoded":
        parser = FormParser(request.headers, request.stream(), max_fields=MAX_FIELDS, max_part_size=most)
    else:
        raise MalformedBody("this is not a form")
    try:
        parsed = await parser.parse()
    except (MultiPartException, UnicodeError):  # their messages may hold what was sent
        raise MalformedBody("the form cannot be read") from None
    except ClientDisconnect:
        raise ClientGone("the client has closed the connection") from None
    fields: dict[str, list[str]] = {}
    file = None
    try:
        for name, value in parsed.multi_items():
            if isinstance(value, str):
                fields.setdefault(name, []).append(value)
            elif value.filename:
                file = (value.filename, await value.read())
    finally:
        await parsed.close()
    return Sent(fields, file)


Form = Annotated[Sent, Depends(_form)]


def checked(model: type[M], values: Mapping[str, Any]) -> M:
    """Raises RequestValidationError, as the API's route would."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from None
