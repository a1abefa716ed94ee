"""`Plan`: what every part of a plan is."""

from pydantic import BaseModel, ConfigDict


class Plan(BaseModel):
    """A frozen part of the plan; JSON in and out, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
