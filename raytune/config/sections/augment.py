"""`data.augment`: further training rows that are made of those that there are."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from raytune.config.sections.section import Fraction, NonNegativeInt, Section, Text
from raytune.config.sections.user_code import CodeName

CONTENT = "{content}"
"""Where the text of a prompt goes in a wording of it."""
Part = Literal["system", "user", "assistant", "text"]
"""What `raytune data reword` words otherwise: turns of these roles, or plain documents."""


def _has_content(wording: str) -> str:
    if wording.count(CONTENT) != 1:
        raise ValueError(f"must have {CONTENT} once, where the prompt's text goes")
    return wording


class AugmentSection(Section):
    """Further training rows, made of those that there are, so that a model learns to answer what is spelt or worded otherwise.
    Rows that are held out, and those of `strategy.replay`, stay as they are and nothing is made of them."""

    copies: Annotated[NonNegativeInt, Field(examples=[2])] = 0
    """How many further rows are made of each training row, beside itself. Those that come out as the row is are left out."""
    noise: Annotated[Fraction, Field(examples=[0.03])] = 0.0
    """Share of the letters of user's turns that a copy has wrong: left out, doubled, in another case, or swapped with the next.
    Words of letters alone have them; numbers, fenced code, addresses and markup stay, and so do answers."""
    wordings: Annotated[
        list[Annotated[Text, AfterValidator(_has_content)]],
        Field(examples=[["Question: {content}", "{content}\nAnswer briefly."]]),
    ] = []
    """Ways to put the first user's turn, of which each copy has one: `{content}` stands for its text."""
    function: CodeName | None = None
    """A function of your own that makes the copies, as `module:function` or `file.py:function`: it is given a row as it is in the
    file (a copy of it) and a `random.Random`, and returns a row, several, or None for none. It runs where rows are tokenised, and
    before noise and wordings."""
    seed: NonNegativeInt = 0
    """Decides what is drawn for each row, whatever its place in the files. Another seed makes other copies."""

    @model_validator(mode="after")
    def _makes_something(self) -> "AugmentSection":
        ways = bool(self.noise or self.wordings or self.function)
        if self.copies and not ways:
            raise ValueError("copies of rows that are changed in no way: set noise, wordings or function")
        if ways and not self.copies:
            raise ValueError("set copies, the number of further rows that are made of each")
        return self
