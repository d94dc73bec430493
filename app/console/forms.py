"""Forms: read into memory, never onto a disk, and checked by the models that the API's bodies are checked by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser

from app.deps import ServiceDep
from app.errors import MalformedBody

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
    """Raises MalformedBody, and what the body's limits raise."""
    most = service.settings.max_body_bytes
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    parser: MultiPartParser | FormParser
    if kind == "multipart/form-data":
        parser = MultiPartParser(
            request.headers, request.stream(), max_files=1, max_fields=MAX_FIELDS, max_part_size=most
        )
        parser.spool_max_size = most + 1  # else forget texts would reach a temporary file
    elif kind == "application/x-www-form-urlencoded":
        parser = FormParser(request.headers, request.stream(), max_fields=MAX_FIELDS, max_part_size=most)
    else:
        raise MalformedBody("this is not a form")
    try:
        parsed = await parser.parse()
    except MultiPartException:  # its message may hold a field's name
        raise MalformedBody("the form cannot be read") from None
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
