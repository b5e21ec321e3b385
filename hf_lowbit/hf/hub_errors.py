"""What goes wrong between here and the Hub, in one sentence that says what to do.

Errors of the client quote addresses with signatures in them and whatever the server said, and have no common base.
Here each becomes a :class:`HubError`; the original is not chained, so that nothing it quotes reaches a log.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_lowbit.errors import HfLowbitError, HubError

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_SAFE_AGAIN = "run the same command again: large files that have arrived are not sent twice"
_TRANSPORT = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")  # by release of huggingface_hub
_MISSING = (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, GatedRepoError)
_PASSING = (408, 429, 500, 502, 503, 504)
# also inside a longer text, such as a JSON string
TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{20,}")
_WAITS = (1.0, 2.0, 4.0)
_LONGEST_WAIT = 60.0
T = TypeVar("T")


def scrubbed(text: str, longest: int = 300) -> str:
    """Return what a server said as it may be shown: one line, cut short, no token, no query of an address."""
    text = TOKEN.sub("(token)", text)
    text = re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", text)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= longest else f"{text[:longest]}…"


@contextlib.contextmanager
def plain_errors(repo: str, again: str = _SAFE_AGAIN) -> Iterator[None]:
    """Turn errors of the client inside a ``with`` statement into :class:`HubError`.

    Args:
        repo: name of the repository, for messages.
        again: what running it once more does, for errors that may pass.
    """
    try:
        yield
    except HfLowbitError:
        raise
    except Exception as error:  # network, hub and header errors have no common base
        text = meaning(error, repo, again)
        if text is None and isinstance(error, ValueError):  # what the client thinks of an argument or of an answer
            text = f"{repo}: {scrubbed(str(error))}"
        if text is None:
            raise
        raise HubError(text) from None


def meaning(error: BaseException, repo: str, again: str = _SAFE_AGAIN) -> str | None:
    """Return in one sentence what an error of the client means; None if it is none."""
    for one in _chain(error):
        if isinstance(one, HfHubHTTPError) and getattr(one, "response", None) is not None:
            return _of_status(one, repo, again)
        if isinstance(one, OfflineModeIsEnabled):
            return f"{repo}: the Hub is switched off here (HF_HUB_OFFLINE)"
        if isinstance(one, HFValidationError):
            return f"{repo}: not the name of a repository, such as user/name"
        if type(one).__module__.partition(".")[0] in _TRANSPORT:
            return f"{repo}: the connection to the Hub failed ({type(one).__name__}); {again}"
    if isinstance(error, LocalEntryNotFoundError):
        return f"{repo}: the Hub could not be reached and nothing of it lies in the cache; {again}"
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return f"{repo}: a file broke off on its way here; {again}"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def status_of(error: BaseException) -> int | None:
    """Return the status of the answer behind an error, None if there was no answer."""
    for one in _chain(error):
        if isinstance(one, HfHubHTTPError) and getattr(one, "response", None) is not None:
            return int(one.response.status_code)
    return None


def is_missing(error: BaseException) -> bool:
    """Return whether an error says that repository, revision or file is not there (or not for this token)."""
    return isinstance(error, _MISSING) or status_of(error) == 404


def _of_status(error: Any, repo: str, again: str) -> str:
    status = int(error.response.status_code)
    said = scrubbed(getattr(error, "server_message", None) or "")
    tail = f" (the Hub says: {said})" if said else ""
    if isinstance(error, RevisionNotFoundError):
        return f"{repo}: there is no such revision"
    if isinstance(error, EntryNotFoundError):
        return f"{repo}: a file is not there{tail}"
    if isinstance(error, GatedRepoError):
        return f"{repo}: access must be asked for on its page first"
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return f"{repo}: the Hub does not know this token; {LOG_IN}"
    if status in (401, 404):
        return f"{repo}: there is no such repository, or it is private and your token may not read it"
    if status == 403:
        return f"{repo}: your token may not write there; make one with write access to it, then {LOG_IN}{tail}"
    if status == 409:
        return f"{repo}: the Hub is busy with another change to it; {again}{tail}"
    if status == 412:
        return f"{repo}: somebody else has changed it meanwhile; nothing was changed; look at it, then {again}"
    if status == 429:
        seconds = _retry_after(error)
        wait = f"wait {seconds:.0f} s" if seconds is not None else "wait a while"
        return f"{repo}: too many requests; {wait}, then {again}"
    if status >= 500:
        return f"{repo}: the Hub has trouble of its own (status {status}); {again}{tail}"
    return f"{repo}: the Hub refused with status {status}{tail}"


def _retry_after(error: Any) -> float | None:
    value = error.response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def patiently(ask: Callable[[], T], look: Callable[[], T | None] = lambda: None) -> T:
    """Make a request that the client itself does not repeat, again while what stands against it may pass.

    Args:
        ask: makes the request; it must do no harm when the answer to an earlier one was lost.
        look: looks after a failure whether the request was done all the same; returns its result, else None.

    Raises:
        Exception: the last error of the client.
    """
    for wait in (*_WAITS, None):
        try:
            return ask()
        except Exception as error:
            status = status_of(error)
            if isinstance(error, RuntimeError) or (status is None and not _is_transport(error)):
                raise  # a RuntimeError is of an upload, which the client has repeated itself
            done = None
            with contextlib.suppress(Exception):  # where it cannot be seen either, asking again will tell
                done = look()
            if done is not None:
                return done
            if wait is None or (status is not None and status not in _PASSING):
                raise
            asked = next((_retry_after(one) for one in _chain(error) if isinstance(one, HfHubHTTPError)), None)
            if asked is not None and asked > _LONGEST_WAIT:
                raise
            time.sleep(wait if asked is None else asked)
    raise RuntimeError("unreachable")


def _is_transport(error: BaseException) -> bool:
    return any(type(one).__module__.partition(".")[0] in _TRANSPORT for one in _chain(error))
