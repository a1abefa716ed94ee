"""`data.split` and `data.fold`: which rows are held out together, and which part of them a run is measured on."""

from typing import Annotated

from pydantic import Field, model_validator

from raytune.config.sections.section import NonNegativeInt, Section, Text


class SplitSection(Section):
    """What decides on which side a row lies, where that is not the hash of its own content. Whatever decides, rows with the same
    content lie on one side. Values are of a column, or at a path through objects and lists (`meta.patient.id`), which each row
    needs."""

    group: Annotated[Text | None, Field(examples=["patient_id"])] = None
    """Column whose value rows have in common that must not lie on both sides: a patient, a user, a document. A hash of the value
    decides, so that rows that are added later move none. Shares are then of values: about those of rows, unless a few values
    have most of them. 1 and "1" are one value."""
    strata: Annotated[Text | None, Field(examples=["label"])] = None
    """Column of whose every value each side has its share, to within one row (one group, with `group`): a label, a language.
    Among the rows of a value their hash decides, so that rows that are added later move a few of those near the border, and no
    others. Beside `group` all rows of a group need the same value."""
    time: Annotated[Text | None, Field(examples=["created_at"])] = None
    """Column by which the latest rows are held out, those of the test after those of validation: ISO dates and times (without a
    zone they count as UTC), or numbers, all in one unit. Rows of the same time lie on one side, so that shares are met only to
    within as many. Rows that are added later move the border."""

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> "SplitSection":
        beside = [name for name in ("group", "strata") if getattr(self, name) is not None]
        if self.time is not None and beside:
            raise ValueError(
                f"time and {beside[0]} do not go together: the latest rows are held out, whatever else they have. Leave one out"
            )
        return self

    @property
    def looks_first(self) -> bool:
        """Whether all rows have to be looked at before it is known where they lie."""
        return self.strata is not None or self.time is not None


class FoldSection(Section):
    """A part of equal parts of the rows."""

    index: Annotated[NonNegativeInt, Field(examples=[0])]
    """Which part is held out, from 0."""
    of: Annotated[int, Field(ge=2, strict=True, examples=[5])]
    """How many parts there are; each row is in exactly one of them."""

    @model_validator(mode="after")
    def _is_one_of_them(self) -> "FoldSection":
        if self.index >= self.of:
            raise ValueError(f"index must be from 0 to {self.of - 1}, of {self.of} folds, got {self.index}")
        return self


def overrides_of(num_folds: int) -> list[str]:
    """What is laid over a config that is trained in folds."""
    return ["data.fold.index=0", f"data.fold.of={num_folds}"]
