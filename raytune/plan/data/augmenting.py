"""What a plan has to hold of `data.augment`, so that processes elsewhere make the same rows: the code of its function."""

from raytune.config.sections.augment import AugmentSection
from raytune.errors import UserError
from raytune.user_code import UserCode, read_code


def code_of(section: AugmentSection) -> UserCode | None:
    """The code of the function that makes rows; None: none is named.

    Raises:
        UserError: if it is not here.
    """
    try:
        return read_code(section.function) if section.function else None
    except UserError as error:
        raise UserError(str(error), keys=("data.augment.function",)) from error
