"""Base of all sections of the config: frozen, strict, with an identity for step keys."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from wrpo_ray.config.values import as_written
from wrpo_ray.errors import UserError

PLACEMENT: Any = {"placement": True}
"""`json_schema_extra` of fields that do not change results."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME)]
ImportPath = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
S = TypeVar("S", bound="Section")
T = TypeVar("T")


class Section(BaseModel):
    """A part of the tree: frozen, and closed to unknown keys.

    Its numbers are finite and given as numbers, and its addresses hold no credentials. A key that
    is a Python keyword has an alias in YAML, and is given to the constructor by its field's name.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_by_name=True,
        validate_by_alias=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        return as_written(value, cls.model_fields[info.field_name or ""].annotation)

    def identity(self) -> dict[str, Any]:
        """The fields that decide a result, JSON-ready: all that are not marked `PLACEMENT`."""
        names = [n for n, f in type(self).model_fields.items() if f.json_schema_extra != PLACEMENT]
        dumped = self.model_dump(mode="json", include=set(names))
        return {n: _identity(getattr(self, n), dumped[n]) for n in names}


def _identity(value: Any, dumped: Any) -> Any:
    if isinstance(value, tuple):
        return [_identity(*pair) for pair in zip(value, dumped, strict=True)]
    if isinstance(value, dict):
        parts = zip(dumped.items(), value.values(), strict=True)
        return {name: _identity(part, of) for (name, of), part in parts}
    return value.identity() if isinstance(value, Section) else dumped


def without_unset(identity: dict[str, Any], *names: str) -> dict[str, Any]:
    """An identity without those of the named fields that are null: keys from before they existed.

    Example:
        >>> without_unset({"path": "a", "reasoning": None}, "reasoning")
        {'path': 'a'}
    """
    return {n: value for n, value in identity.items() if n not in names or value is not None}


NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


def required(value: T | None, key: str) -> T:
    """Return the value of an optional key that is required here.

    Raises:
        UserError: the config omits it.
    """
    if value is None:
        raise UserError(f"{key}: missing; this step needs it in the config")
    return value
