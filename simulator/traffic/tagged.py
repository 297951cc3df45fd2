"""Tables of a scenario that say by one field (``kind``, ``process``) which record they are."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, BeforeValidator

from simulator.catalog.files import parse
from simulator.errors import InputError, nearest

R = TypeVar("R", bound=BaseModel)


def tagged(tag: str, records: Mapping[str, type[R]]) -> BeforeValidator:
    """Validator of a union: ``{tag = "name", …}`` becomes ``records["name"]``.

    Used in place of pydantic's own discriminator, whose errors give neither the nearest name nor the field as the
    person wrote it.
    """

    def choose(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value
        if not isinstance(value, dict):
            raise ValueError(f'must be a table such as {{ {tag} = "{next(iter(records))}", … }}')  # noqa: TRY004 - pydantic reports only ValueError
        name = value.get(tag)
        if name is None:
            raise ValueError(f"{tag}: required, but missing; known: {', '.join(records)}")
        if name not in records:
            raise ValueError(f"unknown {tag} {name!r}{nearest(str(name), records)}")
        try:
            return parse(records[name], value, f"{tag} = {name!r}")
        except InputError as error:
            raise ValueError(str(error).replace(": file: ", ": ")) from None

    return BeforeValidator(choose)
