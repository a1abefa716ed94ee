"""Further training rows, made of those that there are: prompts misspelt or put otherwise, or what a function of the user's makes.

What a row becomes is drawn from its content, the number of the copy and a seed, so that it is the same in every file, order,
shard and process. It is made where the side of its row is known, so that nothing that is held out is trained in other words.
"""

import copy
import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from raytune.config.sections.augment import CONTENT, AugmentSection
from raytune.data.conversations.conversation import Conversation, Message, Origin, RowError
from raytune.data.formats.recognising import Reading, read_row
from raytune.errors import DataError, UserError
from raytune.user_code import UserCode, load, told

_KEY = "data.augment"
_FENCE = re.compile(r"(```|~~~)")
# A chunk between white space that is a word of letters, with quotes or brackets around it and a mark behind.
_WORD = re.compile(r"(?<!\S)[(\"'“‘]*([^\W\d_]{2,})[)\"'”’.,;:!?]*(?!\S)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """How further rows are made; the fields of `data.augment`, the function with its code."""

    copies: int
    noise: float
    wordings: tuple[str, ...]
    function: UserCode | None
    seed: int


def augmentation_of(section: AugmentSection, code: UserCode | None) -> Augmentation | None:
    """What a config asks to be made of training rows; None: nothing.

    Args:
        code: of its function (`plan.augmenting.code_of`).
    """
    if not section.copies:
        return None
    wordings = tuple(section.wordings)
    return Augmentation(copies=section.copies, noise=section.noise, wordings=wordings, function=code, seed=section.seed)


def copies_of(
    row: Mapping[str, Any], original: Conversation, reading: Reading, augmentation: Augmentation
) -> Iterator[Conversation]:
    """What is made of a row, without what comes out as it is.

    Args:
        row: as it is in its file.
        original: what the row is.
        reading: how rows of its source are read.

    Raises:
        DataError: if the row cannot be changed in the way that is asked for, or the function's result is no row.
        UserError: if the function raises.
    """
    if original.text is not None and (augmentation.noise or augmentation.wordings):
        raise DataError(
            f"{original.origin} is plain text, which has no prompt: noise and wordings would be trained as what is to be "
            f"written. Leave out {_KEY}.noise and {_KEY}.wordings, or name a {_KEY}.function.",
            keys=(_KEY,),
        )
    content = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    for number in range(augmentation.copies):
        chance = random.Random(f"{augmentation.seed}/{number}/{content}")
        for made in _made(row, original, reading, augmentation, chance):
            changed = _put_otherwise(made, augmentation, chance)
            if (changed.messages, changed.text, changed.tools) != (original.messages, original.text, original.tools):
                yield changed


def _made(
    row: Mapping[str, Any], original: Conversation, reading: Reading, augmentation: Augmentation, chance: random.Random
) -> Iterator[Conversation]:
    code, origin = augmentation.function, original.origin
    if code is None:
        yield original
        return
    function = load(code)
    try:
        result = function(copy.deepcopy(dict(row)), chance)
    except Exception as error:
        raise UserError(f"{code}, given the row {origin}: {told(error, code)}", keys=(f"{_KEY}.function",)) from error
    for made in [] if result is None else result if isinstance(result, list) else [result]:
        yield _read(made, reading, origin, code)


def _read(made: Any, reading: Reading, origin: Origin, code: UserCode) -> Conversation:
    if not isinstance(made, Mapping):
        what = f"returned {type(made).__name__}, where a row (a dict), a list of rows or None is expected"
        raise DataError(f"{code}, given the row {origin}, {what}.", keys=(f"{_KEY}.function",))
    try:
        return read_row(made, reading, origin)
    except RowError as error:
        message = f"What {code} made of the row {origin} is none of the format {reading.format}: {error}"
        raise DataError(message, keys=(f"{_KEY}.function",)) from error


def _put_otherwise(row: Conversation, augmentation: Augmentation, chance: random.Random) -> Conversation:
    messages, is_first = [], True
    for message in row.messages:
        text = message.get("content")
        if message["role"] == "user" and isinstance(text, str):
            if augmentation.noise:
                text = misspelt(text, augmentation.noise, chance)
            if is_first and augmentation.wordings:
                text = chance.choice(augmentation.wordings).replace(CONTENT, text)
            is_first = False
            message: Message = {**message, "content": text}
        messages.append(message)
    return replace(row, messages=tuple(messages))


def misspelt(text: str, share: float, chance: random.Random) -> str:
    """A text in which about `share` of the letters of plain words are wrong. Fenced code blocks stay as they are."""
    parts, is_code = _FENCE.split(text), False
    for index, part in enumerate(parts):
        if _FENCE.fullmatch(part):
            is_code = not is_code
        elif not is_code:
            parts[index] = _WORD.sub(lambda found: _misspelt_word(found, share, chance), part)
    return "".join(parts)


def _misspelt_word(found: re.Match[str], share: float, chance: random.Random) -> str:
    before, word, behind = found[0][: found.start(1) - found.start()], found[1], found[0][found.end(1) - found.start() :]
    letters: list[str] = []
    place = 0
    while place < len(word):
        letter, following = word[place], word[place + 1 : place + 2]
        place += 1
        if chance.random() >= share:
            letters.append(letter)
            continue
        match chance.choice(("left out", "doubled", "case", "swapped")):
            case "left out":
                continue
            case "doubled":
                letters += [letter, letter]
            case "case":
                letters.append(letter.swapcase())
            case _:
                letters += [following, letter]
                place += len(following)
    return before + ("".join(letters) or word) + behind
