"""Verbs of configs as functions: those of other trainers become configs of raytune."""

from os import fspath
from typing import TYPE_CHECKING

from raytune.api.asked import File

if TYPE_CHECKING:
    from raytune.importing.imported import Imported, ProjectName


def import_config(path: File, *, of: "ProjectName | None" = None, gpus: int | None = None) -> "Imported":
    """Convert a config of Axolotl, LLaMA-Factory or `trl sft --config` as `raytune import` does. Writes nothing.

    Args:
        path: the YAML (or JSON) file.
        of: "axolotl", "llamafactory" or "trl", where the keys of the file do not say it.
        gpus: on how many it was trained there; with them the rows per step are written, without them the rows per GPU.

    Returns:
        `config`, which `train` and the others take, `yaml` with where each value comes from, `accounts` of what became of each
        key, `left` (those without counterpart) and `open_questions`.

    Raises:
        raytune.errors.UserError: if it is not told whose file it is, if a value is none, or if it asks for another kind of
            training than supervised fine-tuning on text.
    """
    from raytune.importing.imported import imported

    return imported(fspath(path), of=of, gpus=gpus)
