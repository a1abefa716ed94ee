"""The base of a run: that of a hub is brought to this machine where it is the cluster, and one that changed is refused."""

from raytune.config.sections.model import ModelSection
from raytune.hub.snapshot import Report
from raytune.model.files.base_content import base_content, is_known_by_commit, refuse_other_base
from raytune.model.files.files import local_files
from raytune.model.files.hub import download_base
from raytune.plan.model.base_model import DEMO
from raytune.plan.run_plan import ModelPlan


def check_base_early(model: ModelSection, path: str) -> None:
    """Hold a base's files against the model that its config describes, before workers start, which do so themselves.

    The built-in base is left to them: for it a driver would import a compiler, half of the time that a plan takes.

    Raises:
        ModelError: naming the tensor or the file that is wrong.
    """
    if path != DEMO:
        from raytune.model.files.base_check import check_base

        check_base(path, model.revision, model.trust_remote_code)


def bring_base(model: ModelPlan, report: Report) -> None:
    """Download what this machine lacks of a base, and hold its files against the model that its config describes.

    Raises:
        ModelError, ClusterError: if it cannot be downloaded, or is no whole model.
    """
    if is_known_by_commit(model) and local_files(model.path, model.revision) is None:  # else `prepare` held them already
        from raytune.model.files.base_check import check_base

        download_base(model.path, model.revision, with_code=model.trust_remote_code, report=report)
        check_base(model.path, model.revision, model.trust_remote_code)


def refuse_changed_base(model: ModelPlan) -> None:
    """Refuse to go on with other weights than those that a plan was made for.

    Raises:
        ModelError: naming each file that changed.
    """
    if model.content is not None:
        now = base_content(model.path, model.revision, trust_remote_code=model.trust_remote_code)
        refuse_other_base(model.path, model.content, now)
