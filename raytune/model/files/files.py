"""Where a model's files are, told without loading any of them: the driver of a run needs no more."""

from pathlib import Path

from raytune.config.sections.model import is_written_as_path
from raytune.errors import ModelError
from raytune.model.files.hub import is_whole
from raytune.model.files.weight_files import stored_tensors, weight_files
from raytune.plan.model.base_model import DEMO, is_on_hub, model_files
from raytune.plan.model.model_folder import check_model_folder


def resolve_model_path(base: str, revision: str | None) -> str:
    """Where transformers finds a base: `demo` as it is (`plan.base_model.model_files` finds it on
    each machine), an absolute path for a folder, else the hub id.

    Raises:
        ModelError: if `base` is written like a path but is not a folder, or is a folder without a model, or with a damaged one.
    """
    if base == DEMO:
        return DEMO
    folder = Path(base).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(f"model.revision is {revision}, but model.base {base} is a folder, which has none. Remove it.")
        _check_folder(folder)
        return str(folder.resolve())
    if is_written_as_path(base):
        raise ModelError(
            f"model.base {base} is not a folder (looked in {folder.absolute()}). Give a folder with config.json and "
            f"*.safetensors, a hub id such as owner/name, or demo."
        )
    return base


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{folder} holds an adapter, not a whole model. Merge it into its base first: "
                f"raytune merge {folder} --output FOLDER"
            )
        raise ModelError(f"{folder} holds no config.json, so it is not a model in the format of transformers.")
    check_model_folder(folder)
    stored_tensors(weight_files(folder))


def local_files(path: str, revision: str | None) -> Path | None:
    """The folder on this machine with the config and the weights of a base; None if they are yet to be downloaded.

    Args:
        path: as `resolve_model_path` gives it.
    """
    folder = Path(model_files(path, revision))
    return folder if folder.is_dir() and (not is_on_hub(path) or is_whole(folder)) else None
