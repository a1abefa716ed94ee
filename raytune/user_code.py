"""Functions of the user's that a config names: `my_losses.py:focal`, a file, or `my_package.losses:focal`, an installed module.

A file is read once, on the machine where the command was given; its text travels with the plan, and every process makes its
module from that. An installed module is imported by each of them, and has to be the same everywhere. To run it is what its user
asked for.
"""

import ast
import hashlib
import importlib
import linecache
import sys
import threading
import traceback
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from raytune.errors import UserError

FILE_ENDING = ".py"
_RUNNING = threading.RLock()
"""Of the thread that runs a module: another finds it whole, as `import` has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UserCode:
    """What a name leads to."""

    module: str
    """Path of a file, or the dotted name of an installed module."""
    name: str
    """Of the function or class in it."""
    text: str
    """Of the module."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def is_file(self) -> bool:
        return self.module.endswith(FILE_ENDING)

    def __str__(self) -> str:
        return f"{self.module}:{self.name}"


def parts_of(reference: str) -> tuple[str, str]:
    """Module or file, and the name in it."""
    module, _, name = reference.rpartition(":")
    return module, name


def read_code(reference: str) -> UserCode:
    """The code that a reference names, without running it.

    Raises:
        UserError: if it is not here.
    """
    module, name = parts_of(reference)
    file = Path(module).expanduser() if module.endswith(FILE_ENDING) else _file_of(module)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{reference}: {file} cannot be read ({what}). Relative paths start at the working directory.") from error
    if module.endswith(FILE_ENDING) and (beside := _beside(file, text)):
        raise UserError(
            f"{module} imports {beside}, which lies beside it and would not be on the workers: of your files only {module} "
            f"itself goes there. Put what it needs into it, or install {beside} on every node."
        )
    return UserCode(module=module, name=name, text=text)


def load(code: UserCode) -> Any:
    """Run the module and return what the name stands for.

    Raises:
        UserError: if the module cannot be run, is another one here than where the plan was made, or has no such name.
    """
    try:
        module = _module_of_text(code) if code.is_file else importlib.import_module(code.module)
    except Exception as error:
        raise UserError(f"{code} cannot be imported. {told(error, code)}{_how_to_install(error, code)}") from error
    if not code.is_file and read_code(str(code)).sha256 != code.sha256:
        raise UserError(
            f"{code.module} is another one on this machine than where the plan was made. Install the same everywhere."
        )
    found: Any = module
    for part in code.name.split("."):
        if not hasattr(found, part):
            public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            has = f" It has {', '.join(public[:8])}." if public else ""
            raise UserError(f"{code.module} has no {code.name}.{has}")
        found = getattr(found, part)
    return found


def told(error: BaseException, code: UserCode) -> str:
    """An error with the line of the user's file that it comes from."""
    file = _file_name(code)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"{file}:{error.lineno}: SyntaxError: {error.msg}: {(error.text or '').strip()}"
    if not frames:
        return what
    line = f": {frames[-1].line}" if frames[-1].line else ""
    return f"{file}:{frames[-1].lineno}, in {frames[-1].name}: {what}{line}"


def _module_of_text(code: UserCode) -> ModuleType:
    """A module of its own for each text, kept as `import` keeps modules: what it defines is pickled by name."""
    name = f"{Path(code.module).stem}_{code.sha256[:12]}"
    with _RUNNING:
        if name in sys.modules:
            return sys.modules[name]
        module = ModuleType(name)
        module.__file__ = code.module
        lines = code.text.splitlines(keepends=True)
        linecache.cache[code.module] = (len(code.text), None, lines, code.module)  # for tracebacks where the file is not
        sys.modules[name] = module  # before it runs: its dataclasses look themselves up
        try:
            exec(compile(code.text, code.module, "exec"), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
        return module


def _file_name(code: UserCode) -> str:
    """As it stands in tracebacks."""
    return code.module if code.is_file else str(_file_of(code.module))


def _file_of(module: str) -> Path:
    """The source file of an installed module."""
    try:
        spec = find_spec(module)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(FILE_ENDING):
        raise UserError(
            f"There is no Python module {module}: neither {module.replace('.', '/')}.py beside the config or in the working "
            f"directory, nor an installed one. A file can be named with its path, as in my_code/{module.split('.')[-1]}.py:NAME."
        )
    return Path(spec.origin)


def _beside(file: Path, text: str) -> str:
    """A module of the user's that a file imports and that is not installed; empty if there is none."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # told when it is run
        return ""
    named = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    roots = dict.fromkeys(name.partition(".")[0] for name in named)
    here = [root for root in roots if (file.parent / f"{root}.py").is_file() or (file.parent / root / "__init__.py").is_file()]
    installed = packages_distributions() if here else {}
    return next((root for root in here if root not in installed and root not in sys.stdlib_module_names), "")


def _how_to_install(error: Exception, code: UserCode) -> str:
    return f" Install {error.name} on every node." if isinstance(error, ModuleNotFoundError) and code.is_file else ""
