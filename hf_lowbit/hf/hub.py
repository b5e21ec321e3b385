"""Push compressed models to the Hub.

A push is one commit: config, weights and card appear together or not at all. Everything that can be known here is
checked first (:mod:`hf_lowbit.hf.preflight`) and the card is rendered. Then the repository is looked at, large files
are sent (after an interruption, those that have arrived are not sent again), the commit is made, and what the Hub then
holds is compared with the files here, hash by hash. Tokens are those of `hf auth login` or ``HF_TOKEN``; none is ever
an argument of a command, and none is shown.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RevisionNotFoundError

from hf_lowbit.errors import HubError
from hf_lowbit.hf.card import CardFields, facts_of
from hf_lowbit.hf.card_page import check_card, is_rendered, render
from hf_lowbit.hf.hub_errors import LOG_IN, is_missing, patiently, plain_errors
from hf_lowbit.hf.preflight import CARD, Preflight, check_folder, secrets_in
from hf_lowbit.hf.record import read_record

logger = logging.getLogger(__name__)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9_][\w.-]{0,94}")
# What a loader would take for weights or settings of the model that is pushed, if it stayed behind.
_STALE = re.compile(
    r"(?:.*/)?(?:[^/]*\.(?:safetensors|bin|pt|pth|ckpt)(?:\.index\.json)?|config\.json|generation_config\.json|"
    r"model_index\.json|compression_report\.jsonl|compression_run\.json|SHA256SUMS)"
)


@dataclasses.dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        url: of the repository, or of the pull request.
        commit: that holds the model.
        files: that the Hub holds now, compared with those here.
        size: bytes of them.
        kept: files of the repository that were there before and belong to no model.
        removed: files that were taken away in the same commit.
        left_out: hidden files of the folder.
        unchanged: whether the repository held all of it before.
    """

    url: str
    commit: str
    files: int
    size: int
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    left_out: tuple[str, ...]
    unchanged: bool


@dataclasses.dataclass(frozen=True)
class _Remote:
    """A revision of a repository: its commit, whether it is private, and the hash of every file."""

    commit: str
    private: bool
    hashes: Mapping[str, str]


def check_repo_id(repo: str) -> str:
    """Return the name of a repository.

    Raises:
        ValueError: it is not user/name.
    """
    if (
        not isinstance(repo, str)
        or not _REPOSITORY.fullmatch(repo)
        or ".." in repo
        or repo.endswith((".git", ".", "-"))
    ):
        raise ValueError(
            f"{ascii(repo)[:120]}: not the name of a repository; it must be user/name or organization/name"
        )
    return repo


def push_folder(
    path: str | Path,
    repo: str,
    fields: CardFields | None = None,
    *,
    results: Mapping[str, Any] | None = None,
    text: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    replace: bool = False,
    message: str | None = None,
    description: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Publish a saved model, or a saved pipeline with compressed models, in one commit.

    Args:
        path: its folder.
        repo: user/name; it is made if there is none.
        fields: what only a person can say, see :class:`CardFields`.
        results: what ``hf-lowbit eval --json`` printed of this folder, for the card.
        text: a card written by hand instead of the rendered one; it is checked like that.
        private: make the repository private; None leaves that to the Hub.
        create_pr: propose the commit as a pull request instead of making it.
        revision: branch to push to, made if there is none; None for the main one.
        replace: the repository may hold another model, which is replaced (its history stays).
        message: of the commit, its first line.
        description: of the commit, below that.
        token: None takes that of ``hf auth login`` or ``HF_TOKEN``.

    Raises:
        ValueError: repository, fields, results or card are not what they must be.
        CheckpointError: the folder cannot be pushed; all that is wrong is named.
        HubError: no token, or the Hub refused, cannot be reached, or holds another model or other bytes afterwards.
    """
    check_repo_id(repo)
    if create_pr and revision is not None:
        raise ValueError("a pull request goes to the main branch; leave out the revision")
    token = token or get_token()
    if not token:
        raise HubError(f"{repo}: no token to push with; {LOG_IN}")
    checked = check_folder(path, token)
    if text is None:
        completed = _with_license(fields or CardFields(), checked, token)
        page = render(facts_of(checked.folder, repo, completed, results, checked.models))
    else:
        check_card(text)
        page = text
    if found := list(secrets_in(page, "the card", token, checked.folder)):
        raise ValueError("; ".join(found))
    push = _Push(HfApi(token=token), repo, checked, page, revision, create_pr)
    push.own_card = text is not None
    line = message or f"Upload a model compressed with {', '.join(_methods(checked))}"
    return push.run(private, replace, line, description)


def _methods(checked: Preflight) -> list[str]:
    return sorted({module.method for model in checked.models.values() for module in model.modules})


def _with_license(fields: CardFields, checked: Preflight, token: str) -> CardFields:
    """Complete the licence by that of the base model on the Hub, where it can be had."""
    base = fields.base_model or read_record(checked.folder).get("base_model")
    if fields.license is not None or base is None:
        return fields
    try:
        data = HfApi(token=token).model_info(base).card_data
    except Exception as error:  # any: the licence can be given, and what is missing is said later
        logger.debug("the licence of %s is not to be had (%s)", base, type(error).__name__)
        return fields
    known = None if data is None else data.get("license")
    return dataclasses.replace(fields, license=known) if isinstance(known, str) else fields


class _Push:
    """One push: what is here, and the steps on the Hub."""

    def __init__(
        self, api: HfApi, repo: str, checked: Preflight, page: str, revision: str | None, create_pr: bool
    ) -> None:
        self.api, self.repo, self.checked = api, repo, checked
        self.page = page.encode()
        self.revision, self.create_pr = revision, create_pr
        self.own_card = False  # written by hand and given as a whole: it may take the place of any other
        self._hashes: dict[str, tuple[str, str]] = {}

    def run(self, private: bool | None, replace: bool, message: str, description: str | None) -> Pushed:
        """Look, send, commit, read back."""
        with plain_errors(self.repo):
            before = patiently(self._remote)
            if before is not None and private and not before.private:
                raise HubError(f"{self.repo}: exists and is public; make it private on its page, or push elsewhere")
            other = self._other(before)
            if other == [CARD] and not replace and not self.create_pr:
                raise HubError(
                    f"{self.repo}: its {CARD} was written or edited by hand; pass your version of it with --card, or "
                    "let it be replaced with --replace"
                )
            if other and not replace and not self.create_pr:
                raise HubError(
                    f"{self.repo}: holds another model already ({', '.join(other[:4])}"
                    f"{', …' if len(other) > 4 else ''}); --replace replaces it in one commit, --pr proposes that"
                )
            if before is None or not before.commit:
                self._create(private, before)
                before = patiently(self._remote)
                if before is None:
                    raise HubError(f"{self.repo}: was made, but cannot be read; {LOG_IN}")
            stale = self._stale(before)
            unchanged = not stale and not self._differing(before)
            commit, url = (
                (before.commit, self._url()) if unchanged else self._commit(before, stale, message, description)
            )
            self._read_back(commit)
        names = self._names()
        kept = [name for name in before.hashes if name not in (*names, *stale, ".gitattributes")]
        size = self.checked.size + len(self.page)
        return Pushed(url, commit, len(names), size, tuple(kept), tuple(stale), self.checked.left_out, unchanged)

    # Here ------------------------------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        return [CARD, *(file.name for file in self.checked.files)]

    def _hash(self, name: str) -> tuple[str, str]:
        """Return both names of a content, see :func:`_hashes_of`; a file is read once."""
        if name not in self._hashes:
            if name == CARD:
                self._hashes[name] = _hashes_of(io.BytesIO(self.page))
            else:
                (file,) = (file for file in self.checked.files if file.name == name)
                with open(file.path, "rb") if file.content is None else io.BytesIO(file.content) as handle:
                    self._hashes[name] = _hashes_of(handle)
        return self._hashes[name]

    def _operations(self, stale: Iterable[str]) -> list[Any]:
        added = [CommitOperationAdd(file.name, file.content or str(file.path)) for file in self.checked.files]
        return [*added, CommitOperationAdd(CARD, self.page), *(CommitOperationDelete(name) for name in stale)]

    # There -----------------------------------------------------------------------------------------------------------

    def _remote(self, revision: str | None = None) -> _Remote | None:
        """Return what a revision holds; None without such a repository, no commit without such a branch."""
        try:
            info = self.api.model_info(self.repo, revision=revision or self.revision, files_metadata=True)
        except Exception as error:
            if not is_missing(error):
                raise
            if self.revision is not None and isinstance(error, RevisionNotFoundError):
                return _Remote("", bool(self.api.model_info(self.repo).private), {})
            return None
        hashes = {one.rfilename: one.lfs.sha256 if one.lfs else one.blob_id or "" for one in info.siblings or []}
        return _Remote(info.sha or "", bool(info.private), hashes)

    def _create(self, private: bool | None, before: _Remote | None) -> None:
        if before is None:
            patiently(lambda: self.api.create_repo(self.repo, private=private, exist_ok=True))
        if self.revision is not None:
            revision = self.revision
            patiently(lambda: self.api.create_branch(self.repo, branch=revision, exist_ok=True))

    def _differing(self, remote: _Remote) -> list[str]:
        """Return the files that the Hub lacks or holds otherwise."""
        return [name for name in self._names() if remote.hashes.get(name) not in self._hash(name)]

    def _stale(self, remote: _Remote) -> list[str]:
        """Return files of another model that must not stay beside this one."""
        return sorted(name for name in remote.hashes if _STALE.fullmatch(name) and name not in self._names())

    def _other(self, remote: _Remote | None) -> list[str]:
        """Return what is there of another model, or was written by hand."""
        if remote is None:
            return []
        changed = [name for name in self._differing(remote) if name in remote.hashes]
        if CARD in changed and (self.own_card or self._is_rendered(remote)):
            changed.remove(CARD)
        return [*self._stale(remote), *changed]

    def _is_rendered(self, remote: _Remote) -> bool:
        path = self.api.hf_hub_download(self.repo, CARD, revision=remote.commit)
        return is_rendered(Path(path).read_text(encoding="utf-8", errors="replace"))

    def _url(self) -> str:
        return f"{self.api.endpoint}/{self.repo}"

    def _commit(self, before: _Remote, stale: list[str], message: str, description: str | None) -> tuple[str, str]:
        """Send the files and make the commit; returns it, and where to look at it."""

        def ask() -> tuple[str, str]:
            info = self.api.create_commit(
                self.repo,
                self._operations(stale),
                commit_message=message,
                commit_description=description,
                revision=self.revision,
                create_pr=self.create_pr,
                parent_commit=None if self.create_pr else before.commit,
            )
            return info.oid, info.pr_url or self._url()

        def look() -> tuple[str, str] | None:  # the answer may have been lost after the commit was made
            now = self._remote()
            done = now is not None and not self._differing(now) and not self._stale(now)
            return (now.commit, self._url()) if now is not None and done else None

        if self.create_pr:  # a second one would stand beside the first, so nothing is repeated
            with plain_errors(self.repo, "look whether the pull request is there before you try again"):
                return ask()
        return patiently(ask, look)

    def _read_back(self, commit: str) -> None:
        """Compare what the Hub holds with what is here.

        Raises:
            HubError: it lacks files, or holds other bytes; they are named.
        """
        after = patiently(lambda: self._remote(commit))
        wrong = self._names() if after is None else self._differing(after)
        if wrong:
            raise HubError(
                f"{self.repo}: holds other bytes than were sent, in {', '.join(wrong[:4])} of commit {commit[:10]}; "
                "do not use it; push again with --replace"
            )


def _hashes_of(handle: BinaryIO) -> tuple[str, str]:
    """Return the SHA-256 of a content and the name that git gives it; the Hub tells the latter of small files."""
    size = handle.seek(0, io.SEEK_END)
    handle.seek(0)
    digests = (hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False))
    while chunk := handle.read(2**20):
        for digest in digests:
            digest.update(chunk)
    return digests[0].hexdigest(), digests[1].hexdigest()


def render_card(path: str | Path, repo: str, fields: CardFields, results: Mapping[str, Any] | None = None) -> str:
    """Render the card of a saved model alone, without a network.

    Raises:
        ValueError, CheckpointError: as :func:`hf_lowbit.hf.card.facts_of`.
    """
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError(f"{path}: there is no such folder")
    return render(facts_of(folder, check_repo_id(repo), fields, results))
