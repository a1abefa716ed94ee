"""A conversation at a terminal, or through pipes: lines in, answers out as they are written."""

import io
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING

from raytune.cli.say import say
from raytune.credentials import redacted
from raytune.errors import ClusterError, UserError
from raytune.serving.talk import BLOCK, COMMANDS, meaning, path_in

if TYPE_CHECKING:
    from raytune.serving.chat import Chat


class Quit(Exception):
    """Nobody wants to talk on."""


def converse(chat: "Chat") -> None:
    """Talk until the end of the input, or /quit.

    Raises:
        UserError: what cannot be done, where no person reads it and goes on.
    """
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  (lines can be edited, and come again with the arrow keys, once it is there)
        say(f"{chat.model} answers. /help lists commands, {BLOCK} begins several lines, Ctrl-C ends an answer, Ctrl-D all.")
        _at_a_terminal(chat)
        return
    with suppress(Quit):
        for text in _piped():
            _turn(chat, text)


def _at_a_terminal(chat: "Chat") -> None:
    while True:
        try:
            _turn(chat, _typed(f"{chat.model}> "))
        except (UserError, ClusterError) as error:
            say(redacted(str(error)), err=True)
        except KeyboardInterrupt:
            say("")
        except (EOFError, Quit):
            say("")
            return


def _turn(chat: "Chat", text: str) -> None:
    """Do what somebody asks for.

    Raises:
        UserError: if it cannot be done.
        Quit: if that is the end.
    """
    asked = meaning(text)
    if not isinstance(asked, str):
        _ACTIONS[asked.name](chat, asked.argument)
    elif asked:
        _show(chat, chat.stream(asked))


def _show(chat: "Chat", answer: Iterator[str]) -> None:
    """An answer as it comes. Ctrl-C ends it, and nothing else."""
    try:
        with closing(answer) as pieces:  # pyright: ignore[reportArgumentType]
            for piece in pieces:
                say(piece, nl=False)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        say(" (ended here)", nl=False)
    say("")
    last = chat.last
    if last is not None and not last.has_ended:
        limit = "max_new_tokens" if last.num_tokens >= chat.style.max_new_tokens else "the model has no positions left: /reset"
        say(f"(cut after {last.num_tokens} tokens: {limit})", err=True)


# --- What is typed -----------------------------------------------------------------------------------------------------------


def _typed(prompt: str) -> str:
    """A turn: a line, or several between marks."""
    with _utf8_only():
        return _block(input(prompt), lambda: input("... "))


def _piped() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")  # Python lets bytes that are no text through where no locale is set
    lines = (line.rstrip("\n") for line in sys.stdin)
    with _utf8_only():
        for line in lines:
            yield _block(line, lambda: next(lines, BLOCK))


@contextmanager
def _utf8_only() -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"What is asked is not {error.encoding.upper()}: byte 0x{error.object[error.start]:02x}.") from error


def _block(line: str, more: Callable[[], str]) -> str:
    """A line with those that belong to it."""
    if not line.lstrip().startswith(BLOCK):
        return line
    text = line.strip()
    while not (text.endswith(BLOCK) and len(text) >= 2 * len(BLOCK)):
        text = f"{text}\n{more()}"
    return text


# --- Commands ----------------------------------------------------------------------------------------------------------------


def _use(chat: "Chat", name: str) -> None:
    chat.use(name)
    say(f"{chat.model} answers from now on.", err=True)


def _list_models(chat: "Chat", _: str) -> None:
    width = max(map(len, chat.models))
    say("\n".join(f"{'*' if name == chat.model else ' '} {name:{width}}  {what}" for name, what in chat.models.items()))


def _set_system(chat: "Chat", text: str) -> None:
    chat.system = text
    say("The system message is set." if text else "There is no system message now.", err=True)


def _set(chat: "Chat", text: str) -> None:
    chat.style = chat.style.changed(text)
    say(str(chat.style), err=bool(text))


def _retry(chat: "Chat", _: str) -> None:
    if not chat.style.temperature:
        say("(the likeliest token each time is the same again; /set temperature=0.7 draws another answer)", err=True)
    _show(chat, chat.retry())


def _reset(chat: "Chat", _: str) -> None:
    chat.reset()
    say("A new conversation.", err=True)


def _save(chat: "Chat", argument: str) -> None:
    path = path_in(argument)
    chat.save(path)
    say(f"Appended to {path}.", err=True)


def _help(_: "Chat", __: str) -> None:
    say("\n".join([*COMMANDS.values(), f"{BLOCK}                begin several lines; {BLOCK} ends them"]))


def _quit(_: "Chat", __: str) -> None:
    raise Quit


_ACTIONS: Mapping[str, Callable[["Chat", str], None]] = {
    "/model": _use,
    "/models": _list_models,
    "/system": _set_system,
    "/set": _set,
    "/retry": _retry,
    "/reset": _reset,
    "/save": _save,
    "/help": _help,
    "/quit": _quit,
}
