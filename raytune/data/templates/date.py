"""The date that a chat template writes, where it writes one: the same on each day.

Templates ask for today's (`strftime_now`), so that a store, a stream that is resumed and answers that are asked for would each
have the date of the day on which they were made. The front of the template answers in the clock's place, with the formats that
it asks for, so that whoever reads it from a saved model asks as was trained, too.
"""

import json
import re
from datetime import datetime

from jinja2 import TemplateSyntaxError, nodes
from transformers.utils import chat_template_utils

from raytune.errors import DataError

ASKED = "strftime_now"
USUAL_DATE = "2024-07-26"
"""That Llama 3's templates write where they have no clock."""
_PINNED = re.compile(rf"{{% macro {ASKED}\(format\) %}}{{{{ (?P<dates>.*?)\[format\] }}}}{{% endmacro %}}\n")


def date_front(text: str, date: str) -> str:
    """What stands in front of a template that asks for a date; empty if it asks for none.

    Args:
        date: as in `2026-11-30`; or "auto": the one that the template was saved with, else USUAL_DATE.

    Raises:
        DataError: if it asks for none and one is given, or in a format that only rendering tells.
    """
    if date == "auto" and (pinned := _PINNED.search(text)):
        return pinned[0]
    formats = _formats(without_date(text))
    if not formats and date != "auto":
        raise DataError(
            f"data.template_date is {date}, but the chat template asks for no date ({ASKED}). A date that is a variable of the "
            f"template belongs in data.template_options.",
            keys=("data.template_date",),
        )
    if not formats:
        return ""
    day = datetime.fromisoformat(USUAL_DATE if date == "auto" else date)
    dates = json.dumps({format: day.strftime(format) for format in sorted(formats)}, ensure_ascii=False)
    return f"{{% macro {ASKED}(format) %}}{{{{ {dates}[format] }}}}{{% endmacro %}}\n"


def without_date(text: str) -> str:
    """A saved template without the date that was put in front of it."""
    return _PINNED.sub("", text, count=1)


def date_notes(template: str, rendered: str) -> list[str]:
    """What a user should know of the date that a template writes.

    Args:
        rendered: what it made of a chat.
    """
    pinned = _PINNED.search(template)
    written = [date for date in json.loads(pinned["dates"]).values() if date in rendered] if pinned else []
    return [
        f"the chat template writes today's date: rows have {date} whatever the day, and so has the template of a saved model "
        f"(data.template_date)."
        for date in written[:1]
    ]


def _formats(text: str) -> set[str]:
    """The formats in which a template asks for a date.

    Raises:
        DataError: if one of them is none that is written in it.
    """
    if ASKED not in text:
        return set()
    environment = chat_template_utils._compile_jinja_template("").environment  # pyright: ignore[reportPrivateUsage]
    try:
        tree = environment.parse(text)
    except TemplateSyntaxError:  # who renders it says so, and where
        return set()
    calls = [call for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Name) and call.node.name == ASKED]
    literal = [call for call in calls if [type(argument) for argument in call.args] == [nodes.Const]]
    asked_for = sum(isinstance(test.node, nodes.Name) and test.node.name == ASKED for test in tree.find_all(nodes.Test))
    named = sum(name.name == ASKED and name.ctx == "load" for name in tree.find_all(nodes.Name))
    if named != len(literal) + asked_for:
        raise DataError(
            f"data.template: the chat template asks for today's date ({ASKED}) in a format that only rendering tells, so that "
            f"its rows would be others each day. Set data.template to a copy of it with the date written in it.",
            keys=("data.template",),
        )
    return {str(call.args[0].as_const()) for call in literal}
