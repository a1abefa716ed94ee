"""A config of another trainer -> a config of raytune."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from raytune.config.checks.readers import unread
from raytune.config.load import config_from
from raytune.config.problems import ConfigError, Place, shown
from raytune.config.reading.files import read_file
from raytune.config.sections.run import RunConfig
from raytune.config.words.foreign_names import answer_for_name
from raytune.config.yaml_nodes import Node
from raytune.errors import UserError
from raytune.importing import axolotl, llama_factory, trl
from raytune.importing.draft import Account, Draft
from raytune.importing.facts import Project, projects
from raytune.importing.written import accounts_of, as_yaml, nested, summary
from raytune.local_files import replace_file

ProjectName = Literal["axolotl", "llamafactory", "trl"]

_CONVERT = {"axolotl": axolotl.convert, "llamafactory": llama_factory.convert, "trl": trl.convert}
_NEW_FILES = ("model_class", "train_dataset", "dist_config", "sample_backend")
"""Keys of LLaMA-Factory's files of version 1, whose keys are others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What `raytune import` made of a file."""

    file: str
    project: ProjectName
    title: str
    """What the project calls itself."""
    yaml: str
    """The config, with where each value comes from, and at its end what was left."""
    config: Mapping[str, Any]
    accounts: tuple[Account, ...]
    """What became of each key, in the order of the file."""
    open_questions: tuple[str, ...]
    """What the file does not say and somebody has to."""

    @property
    def left(self) -> tuple[Account, ...]:
        return tuple(account for account in self.accounts if account.fate == "left")

    @property
    def summary(self) -> str:
        return "\n".join(summary(self.title, self.file, self.accounts, self.open_questions))

    def to_json(self) -> dict[str, Any]:
        accounts = [
            {"key": each.key, "line": each.place.line, "value": each.value, "fate": each.fate, "note": each.note}
            | {"ours": [{"key": key, "value": value} for key, value in each.ours]}
            for each in self.accounts
        ]
        facts = {"file": self.file, "project": self.project, "config": self.config, "yaml": self.yaml}
        return facts | {"accounts": accounts, "open_questions": list(self.open_questions)}


def imported(file: str, *, of: ProjectName | None = None, gpus: int | None = None) -> Imported:
    """Convert a config of Axolotl, LLaMA-Factory or `trl sft`.

    Args:
        of: the project, where its keys do not say it.
        gpus: that it was trained on; with them the rows per step are written.

    Raises:
        UserError: if it cannot be told whose it is, or asks for what raytune does not do.
        ConfigError: if it cannot be read, or holds values that are none.
    """
    tree, problems = read_file(file, 0, merges=True)
    if problems or tree is None or not isinstance(tree.value, dict):
        raise ConfigError(problems) if problems else UserError(f"{file} is empty: there is nothing to convert.")
    project = _project(file, tree.value, of)
    _refuse(project, file, tree.value)
    draft = Draft(project, dict(tree.value), gpus)
    _CONVERT[project.id](draft, file)
    draft.account_for_the_rest()
    if draft.problems:
        raise ConfigError(sorted(dict.fromkeys(draft.problems), key=lambda problem: problem.place.order))
    _take_back_unread(draft)
    config = nested(draft.values)
    _check(draft, config)
    return Imported(
        file=file,
        project=project.id,  # pyright: ignore[reportArgumentType]
        title=project.title,
        yaml=as_yaml(draft, file),
        config=config,
        accounts=tuple(accounts_of(draft)),
        open_questions=tuple(draft.open_questions),
    )


def save_config(found: Imported, output: Path, *, force: bool) -> None:
    """Write a config to a file.

    Raises:
        UserError: if there is one already.
    """
    if output.exists() and not force:
        raise UserError(f"{output} is there already: nothing was written. --force writes over it.")
    replace_file(output, lambda file: file.write(found.yaml.encode()))


def _project(file: str, said: Mapping[str, Node], of: str | None) -> Project:
    if of is not None:
        return projects()[of]
    found = {name: sorted(project.known_by & said.keys()) for name, project in projects().items()}
    found |= {name: sorted(all_of) for name, p in projects().items() if (all_of := p.known_by_all_of) and all_of <= said.keys()}
    known = {name: names for name, names in found.items() if names}
    if len(known) == 1:
        return projects()[next(iter(known))]
    if len(said.keys() & set(_NEW_FILES)) > 1:
        raise UserError(
            f"{file} is of LLaMA-Factory's version 1 (model_class, train_dataset, ...), which raytune does not read; files with "
            "model_name_or_path, dataset and finetuning_type are."
        )
    choices = " or ".join(f"--of {name}" for name in projects())
    if not known:
        raise UserError(f"{file}: none of its keys says whether it is of Axolotl, LLaMA-Factory or TRL. Say it: {choices}.")
    words = "; ".join(f"{', '.join(names[:3])} of {projects()[name].title}" for name, names in known.items())
    raise UserError(f"{file} has keys of several projects: {words}. Say which it is of: {choices}.")


def _refuse(project: Project, file: str, said: Mapping[str, Node]) -> None:
    for key, refusal in project.refused.items():
        value = said[key].plain if key in said else None
        if value in (None, "", False, 0, [], {}) or value in refusal.unless:
            continue
        answer = answer_for_name("", key, value)
        why = refusal.say or (answer.note if answer else "")
        raise UserError(
            f"{said[key].key_place}: {key}: {shown(value)} has no counterpart: {why.rstrip('.')}. Nothing was converted."
        )


def _take_back_unread(draft: Draft) -> None:
    """Take out what nothing reads here, such as a beta of Adam beside another optimizer; mostly nothing reads it there either."""
    try:
        config = RunConfig.model_validate(nested(draft.values))
    except ValidationError:
        return  # loading will say what is wrong
    for key in unread(config):
        draft.take_back(key.key, key.reason)


def _check(draft: Draft, config: Mapping[str, Any]) -> None:
    """Load what was made; what is wrong with it is wrong in the file that it comes from."""
    try:
        config_from(config)
    except ConfigError as error:
        raise ConfigError([_at_home(draft, problem) for problem in error.problems]) from None


def _at_home(draft: Draft, problem: Any) -> Any:
    below = (place for key, place in draft.places.items() if f"{key}.".startswith(f"{problem.key}."))
    return replace(problem, place=next(below, Place("imported config")))
