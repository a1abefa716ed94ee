"""Real templates and their training twins, as TRL ships them: our mask on one against the `{% generation %}` blocks of the other.

`python -m tests.templates.twins` prints the table. Differences that are ours on purpose, and no disagreement:
- text that the generation prompt writes is not trained (twins mark `<|start|>assistant` or an opened `<think>` in places);
- white space around an answer and its end is not trained (twins mark the newline behind `<|im_end|>`);
- where the prompt is no prefix of the text, an answer begins anywhere from the end of what both have to its first own character;
- thoughts of turns before the last question may be dropped from the text, or the row may be refused for it.
"""

import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from raytune.data.conversations.conversation import Conversation, RowError
from raytune.data.templates.template import ChatTemplate, Rendered
from raytune.errors import DataError
from tests.templates.shapes import SHAPES, SPECIAL, Unrendered, lost_fields, pieces_of, placed, plainly_rendered, tokenizer_for

_BLOCK = re.compile(r"(\{%-?)\s*(?:end)?generation\s*(-?%\})")
Spans = list[tuple[int, int]]

# A tool's result follows a call within the same turn; its marker is where the model stops, which twins leave out.
_NEXT_MARKERS = ("<|tool_response>",)
_LETTERS = {"agrees": "=", "refused": "r", "DIFFERS": "DIFFERS"}
# Words that name a lost field in a message; other fields by their own name.
_NAMES = {"thought": "think|thought", "reasoning_content": "reasoning", "user": "content|user"}


def twins_folder() -> Path | None:
    """Where TRL keeps its templates; None if it is not installed. TRL itself is not imported."""
    spec = importlib.util.find_spec("trl")
    return Path(spec.origin).with_name("chat_templates") if spec and spec.origin else None


def families(folder: Path) -> list[str]:
    """Names of the templates that have a twin, and of those that carry markers themselves."""
    originals = [path.stem for path in sorted(folder.glob("*.jinja")) if not path.stem.endswith("_training")]
    return [name for name in originals if (folder / f"{name}_training.jinja").exists() or _has_blocks(folder / f"{name}.jinja")]


def _has_blocks(path: Path) -> bool:
    return _BLOCK.search(path.read_text()) is not None


@dataclass(frozen=True, slots=True)
class Verdict:
    """agrees, refused, or DIFFERS; and why."""

    word: str
    why: str = ""


def without_blocks(template: str) -> str:
    """A twin without its markers: writes the same text, and says nothing of who wrote it."""
    return _BLOCK.sub(lambda match: f"{match[1]} set unused = 0 {match[2]}", template)


@cache
def opened(template: str) -> ChatTemplate | DataError:
    try:
        return ChatTemplate(tokenizer_for(template), template)
    except DataError as error:
        return error


def verdict(original: str, twin: str, row: Conversation) -> Verdict:
    """Compare our mask on `original` with the blocks of `twin`."""
    template = opened(original)
    found = template if isinstance(template, DataError) else template.render([row], "assistant")[0]
    try:
        plain, _ = plainly_rendered(original, row)
    except Unrendered as error:
        if isinstance(found, Rendered):
            return Verdict("DIFFERS", f"rendered, which the template refuses: {error}")
        return _refusal(found, original, row, None, error.failures)
    if isinstance(found, RowError | DataError):
        return _refusal(found, original, row, plain, [])
    if lost := lost_fields(plain, row):
        return Verdict("DIFFERS", f"trained without {', '.join(lost)}, which the template does not show")
    if found.text != plain:
        return Verdict("DIFFERS", f"another text: {found.text!r} for {plain!r}")
    try:
        marked, spans = plainly_rendered(twin, row)
    except Unrendered as error:
        return Verdict("DIFFERS", f"the twin cannot be rendered: {error}")
    expected = _carried_over(marked, spans, plain)
    if expected is None:
        return Verdict("DIFFERS", f"the twin writes more than other answers: {marked!r} for {plain!r}")
    return _compared(found, expected, original, row)


def _refusal(found: RowError | DataError, original: str, row: Conversation, plain: str | None, errors: list[str]) -> Verdict:
    message = str(found)
    lost = lost_fields(plain, row, earlier_thoughts=True) if plain is not None else []
    if isinstance(found, DataError):  # of all rows: the simplest must show why
        simplest = SHAPES["single"]
        try:
            lost = [*lost, *lost_fields(plainly_rendered(original, simplest)[0], simplest)]
        except Unrendered as error:
            errors = error.failures
    if plain is not None and not lost and not errors:
        if _is_scattered(plain, row):
            return Verdict("refused", "what the assistant writes in one turn stands on both sides of another's text")
        return Verdict("DIFFERS", f"refused though everything is shown: {message}")
    cause = " / ".join(dict.fromkeys([*errors, *([f"{', '.join(dict.fromkeys(lost))} not shown"] if lost else [])]))
    if any(error in message for error in errors) or any(re.search(_NAMES.get(field, field), message) for field in lost):
        return Verdict("refused", cause)
    return Verdict("DIFFERS", f"refused without the cause ({cause}): {message}")


def _is_scattered(text: str, row: Conversation) -> bool:
    pieces = pieces_of(row)
    found = sorted((place, piece.turn) for place, piece in zip(placed(text, pieces), pieces) if place >= 0 <= piece.turn)
    turns = [turn for _, turn in found]
    return turns != sorted(turns)


def _carried_over(marked: str, spans: Spans, plain: str) -> Spans | None:
    """The twin's spans in the original's text, whose answers may be shorter (without thoughts).

    None if they differ in anything else.
    """
    edges = [0, *(edge for span in spans for edge in span), len(marked)]
    around = [re.escape(marked[start:end]) for start, end in zip(edges[::2], edges[1::2])]
    match = re.fullmatch("(.*?)".join(around), plain, re.DOTALL)
    return [match.span(number + 1) for number in range(len(spans))] if match else None


def _compared(found: Rendered, expected: Spans, original: str, row: Conversation) -> Verdict:
    text = found.text
    pieces = pieces_of(row)
    own_places = [place for piece, place in zip(pieces, placed(text, pieces)) if piece.is_own and place >= 0]
    prompt_ends = _prompt_ends(original, text, row)
    must, may, notes = np.zeros(len(text), bool), np.zeros(len(text), bool), []
    for start, end in expected:
        core = text[start:end].strip()
        core_start = start + text[start:end].index(core)
        must[core_start : core_start + len(core)] = True
        may[start:core_start] = may[core_start + len(core) : end] = True
    for start, end in expected:
        first_own = min([end, *(place for place in own_places if start <= place < end)])
        for prompt_end, is_prefix in prompt_ends:
            if start <= prompt_end <= first_own:
                must[start:prompt_end] = may[start:prompt_end] = False
                if not is_prefix:
                    notes.append("the prompt is no prefix")
                    must[prompt_end:first_own], may[prompt_end:first_own] = False, True
            elif (
                is_prefix
                and prompt_end < start
                and not must[prompt_end:start].any()
                and not _others(text, prompt_end, start, row)
            ):
                may[prompt_end:start] = True
        for marker in _NEXT_MARKERS:
            if text.startswith(marker, end):
                may[end : end + len(marker)] = True
    trained = np.zeros(len(text), bool)
    for start, end in found.targets:
        trained[start:end] = True
    if (must & ~trained).any() or (trained & ~must & ~may).any():
        return Verdict("DIFFERS", f"trained {_shown(text, found.targets)} for {_shown(text, expected)}")
    return Verdict("agrees", ", ".join(dict.fromkeys(notes)))


def _others(text: str, start: int, end: int, row: Conversation) -> bool:
    """Whether somebody else's text stands there."""
    pieces = pieces_of(row)
    return any(start <= place < end for piece, place in zip(pieces, placed(text, pieces)) if not piece.is_own)


def _prompt_ends(original: str, text: str, row: Conversation) -> list[tuple[int, bool]]:
    """For each answer: how far its generation prompt and the text are the same, and whether that is all of the prompt."""
    ends = []
    for turn, message in enumerate(row.messages):
        if message["role"] == "assistant":
            try:
                prompt, _ = plainly_rendered(original, row, num_turns=turn)
            except Unrendered:  # then the twin's beginning stands
                continue
            same = next((index for index, (a, b) in enumerate(zip(prompt, text)) if a != b), min(len(prompt), len(text)))
            # No token is the same by half.
            same = next((match.start() for match in SPECIAL.finditer(text) if match.start() < same < match.end()), same)
            ends.append((same, same == len(prompt)))
    return ends


def _shown(text: str, spans: Spans) -> str:
    return repr([text[start:end] for start, end in spans])


def table(folder: Path) -> Iterator[tuple[str, str, Verdict]]:
    """(template, shape, verdict) of each original against its twin, and of each twin without its markers against itself."""
    for name in families(folder):
        original = (folder / f"{name}.jinja").read_text()
        path = folder / f"{name}_training.jinja"
        twin = path.read_text() if path.exists() else original
        for shape, row in SHAPES.items():
            yield name, shape, verdict(original, twin, row)
            yield f"{name}, unmarked twin", shape, verdict(without_blocks(twin), twin, row)


def main() -> None:
    folder = twins_folder()
    if folder is None:
        sys.exit("trl is not installed: pip install --no-deps 'trl>=1.16,<2'")
    rows: dict[str, dict[str, Verdict]] = {}
    for name, shape, found in table(folder):
        rows.setdefault(name, {})[shape] = found
    print(f"| template | {' | '.join(SHAPES)} |\n|---|{'---|' * len(SHAPES)}")
    for name, found in rows.items():
        cells = [_LETTERS[one.word] + ("*" if one.word == "agrees" and one.why else "") for one in found.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    print()
    for name, found in rows.items():
        for shape, one in found.items():
            if one.why:
                print(f"{name} / {shape}: {one.word}: {one.why}")


if __name__ == "__main__":
    main()
