"""The base of every section of a run config, and the field types that several sections share."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from raytune.credentials import find_secret
from raytune.units import parse_duration, parse_size


class Section(BaseModel):
    """A frozen group of keys. Unknown keys are refused; the string under a field is its documentation everywhere."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


def _size(value: Any) -> Any:
    return parse_size(value) if isinstance(value, str) else value


def _duration(value: Any) -> Any:
    return parse_duration(value) if isinstance(value, str) else value


def _no_secret(text: str) -> str:
    if found := find_secret(text):
        raise ValueError(
            f"looks like a secret: {found}; secrets belong in the node's own login or a mounted file, never in a config"
        )
    return text


Auto = Literal["auto"]
Size = Annotated[
    int, BeforeValidator(_size, json_schema_input_type=int | str), Field(ge=0, title="a size such as 40GiB", examples=["40GiB"])
]
Duration = Annotated[
    float,
    BeforeValidator(_duration, json_schema_input_type=float | str),
    Field(gt=0, title="a duration such as 15m", examples=["15m"]),
]
Text = Annotated[str, Field(min_length=1), AfterValidator(_no_secret)]
PositiveInt = Annotated[int, Field(ge=1, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
