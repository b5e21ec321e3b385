"""Pull compressed models from the Hub: look first, download, check, and only then let the folder appear."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from hf_lowbit.errors import CheckpointError
from hf_lowbit.hf.hub import check_repo_id
from hf_lowbit.hf.hub_errors import plain_errors
from hf_lowbit.hf.preflight import KNOWN_NAMES, KNOWN_SUFFIXES
from hf_lowbit.hf.save import check_target, put_in_place
from hf_lowbit.report.headers import parts
from hf_lowbit.report.inspect import inspect
from hf_lowbit.report.verify import verify

logger = logging.getLogger(__name__)
_AGAIN = "run the same command again: it goes on where it was"


def pull(repo: str, path: str | Path, revision: str | None = None, overwrite: bool = False) -> Path:
    """Download a compressed model, or a pipeline with such, and check it; the folder appears when it is sound.

    Until then it lies in a hidden folder beside it, so that an interrupted pull goes on where it was.

    Args:
        repo: user/name.
        path: folder to be made.
        revision: branch, tag or commit; None for the main branch.
        overwrite: replace a model that lies there.

    Raises:
        ValueError: as :func:`hf_lowbit.hf.hub.check_repo_id` and :func:`hf_lowbit.hf.save.check_target`.
        CheckpointError: it is not compressed by this package, or damaged; what is wrong is named.
        HubError: it cannot be had.
    """
    check_repo_id(repo)
    target = check_target(path, overwrite)
    with plain_errors(repo, "try again"):
        info = HfApi().model_info(repo, revision=revision)
    names = [one.rfilename for one in info.siblings or []]
    for part in parts(repo, info.sha):  # headers only: what cannot be used is not downloaded
        inspect(repo, part, info.sha)
    waiting = target.with_name(f".{target.name}.{(info.sha or '')[:8]}.pull")
    patterns = [*(f"*{suffix}" for suffix in KNOWN_SUFFIXES), *(f"*{name}" for name in KNOWN_NAMES)]
    with plain_errors(repo, _AGAIN):
        snapshot_download(repo, revision=info.sha, local_dir=waiting, allow_patterns=patterns)
    shutil.rmtree(waiting / ".cache", ignore_errors=True)
    problems = [problem for part in parts(waiting) for problem in verify(waiting, part).problems]
    if problems:
        shutil.rmtree(waiting)
        raise CheckpointError(f"{repo}: was damaged before it was pushed, or on its way: {'; '.join(problems[:3])}")
    left = [name for name in names if name != ".gitattributes" and not (waiting / name).is_file()]
    if left:
        logger.warning("%s: not downloaded, no files of a model: %s", repo, ", ".join(map(ascii, left[:10])))
    put_in_place(waiting, target)
    return target
