"""Which of the models that a user names are served."""

from raytune.errors import UserError
from raytune.launch.asking.models_to_ask import BASE, Subject, ToAsk


def served_subjects(to_ask: ToAsk) -> tuple[Subject, ...]:
    """All that lie over one base, this first; of a model that was trained whole, its base is another one and is left out.

    Raises:
        UserError: if adapters lie over a base beside another whole model.
    """
    subjects = to_ask.subjects
    if all(one.asked.model == subjects[0].asked.model for one in subjects):
        return subjects
    if beside := next((one for one in subjects if one.asked.adapter), None):
        whole = next(one for one in subjects if one.name != BASE and not one.asked.adapter)
        raise UserError(
            f"{whole.source} was trained whole, and the adapter {beside.name} lies over its base: that is two models. Serve the "
            f"base with its adapters, and the other one by itself."
        )
    return tuple(one for one in subjects if one.name != BASE)
