"""What is looked at before a folder goes to the Hub: is it whole, is it sound, does it hold what must not be public.

Nothing here talks to a network. All that is wrong is named in one message.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hf_lowbit.compress.checksums import ORIGIN
from hf_lowbit.config import parse_json
from hf_lowbit.errors import CheckpointError
from hf_lowbit.hf.hub_errors import TOKEN
from hf_lowbit.hf.record import public_name
from hf_lowbit.report.headers import parts
from hf_lowbit.report.inspect import Inspection, inspect
from hf_lowbit.report.tables import size_text
from hf_lowbit.report.verify import verify

CARD = "README.md"
LARGEST_FILE = 50_000_000_000
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".msgpack"}
_TEXT = {".json", ".jsonl", ".md", ".txt", ".jinja", ".py", ".yaml", ".yml"}
KNOWN_SUFFIXES = {*_TEXT, ".safetensors", ".model", ".spm", ".tiktoken", ".png", ".jpg", ".jpeg", ".webp"}
KNOWN_NAMES = {"SHA256SUMS", "LICENSE", "NOTICE"}
# A word list may hold anything that looks like a path.
_WORD_LISTS = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"}
_HOME = re.compile(r"(?<![\w.])(?:/home/|/Users/|/root/|[A-Za-z]:\\{1,2}Users\\{1,2})[^\s\"'<>]+")
_KEY = "-----BEGIN "
_MOST_PROBLEMS = 5


@dataclasses.dataclass(frozen=True)
class LocalFile:
    """A file that is pushed.

    Attributes:
        name: in the repository.
        path: where it lies.
        size: bytes that are pushed.
        content: pushed instead of what lies there: a config without the place that a model was loaded from.
    """

    name: str
    path: Path
    size: int
    content: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Preflight:
    """A folder that may be pushed.

    Attributes:
        folder: that was looked at.
        files: that are pushed.
        left_out: hidden files, which are not.
        models: what the compressed models in it are made of: by folder in a pipeline, else by "".
    """

    folder: Path
    files: tuple[LocalFile, ...]
    left_out: tuple[str, ...]
    models: dict[str, Inspection]

    @property
    def size(self) -> int:
        """Bytes of all files that are pushed."""
        return sum(file.size for file in self.files)


def check_folder(path: str | Path, token: str | None = None) -> Preflight:
    """Look at a saved model or pipeline before it is pushed.

    Args:
        path: its folder.
        token: that is used for the push; it must be in no file.

    Raises:
        ValueError: no folder.
        CheckpointError: something in it is damaged, not of a model, or must not be public; all of it is named.
    """
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError(f"{path}: there is no such folder")
    files, left_out, problems = _listed(folder)
    if problems:
        raise CheckpointError(_message(folder, problems))
    found = parts(folder)
    models = {}
    for part in found:
        models[part] = inspect(folder, part)
        where = f"{part}/" if part else ""
        problems += [f"{where}{problem}" for problem in verify(folder, part).problems]
    for file in files:
        problems += _problems_in(file, token, folder)
    if problems:
        raise CheckpointError(_message(folder, problems))
    return Preflight(folder, tuple(files), tuple(left_out), models)


def _message(folder: Path, problems: list[str]) -> str:
    more = f"; {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
    return f"{folder.name}: cannot be pushed: {'; '.join(problems[:_MOST_PROBLEMS])}{more}"


def _listed(folder: Path) -> tuple[list[LocalFile], list[str], list[str]]:
    """Return files to push, hidden ones, and what is wrong with names and kinds; the card is rendered anew."""
    files, left_out, problems = [], [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")):
            left_out += [name] if path.is_file() else []
        elif not name.isprintable() or not re.fullmatch(r"[\w./ +@-]+", name):
            problems.append(f"{name!a} is not a name for a file on the Hub")
        elif path.is_symlink():
            problems.append(f"{name} is a link; copy the folder with what its links lead to")
        elif path.is_dir() or name == CARD:
            continue
        elif path.suffix in _PICKLED:
            problems.append(f"{name} may run code when it is loaded; only safetensors files are pushed")
        elif path.suffix not in KNOWN_SUFFIXES and path.name not in KNOWN_NAMES:
            problems.append(f"{name} is no file of a model; move it elsewhere")
        else:
            size = path.stat().st_size
            if size > LARGEST_FILE:
                problems.append(f"{name} has {size_text(size)}; save smaller shards (--max-shard-size 5GB)")
            content = _without_origin(path) if path.suffix == ".json" else None
            files.append(LocalFile(name, path, size if content is None else len(content), content))
    return files, left_out, problems


def _without_origin(path: Path) -> bytes | None:
    """Return a config without the folder that its model was loaded from, None where it names none."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError:  # named later
        return None
    origin = content.get(ORIGIN) if isinstance(content, dict) else None
    if origin is None or public_name(origin) == origin:
        return None
    rest = {key: value for key, value in content.items() if key != ORIGIN}
    return (json.dumps(rest, indent=2) + "\n").encode()


def _problems_in(file: LocalFile, token: str | None, folder: Path) -> Iterator[str]:
    """Yield what a file holds that must not be public, and whether it is no JSON where it should be."""
    text = _text_of(file.path) if file.content is None else file.content.decode()
    if text is None:
        return
    if file.path.suffix == ".json":
        try:
            parse_json(text)
        except ValueError:
            yield f"{file.name} is not valid JSON"
    yield from secrets_in(text, file.name, token, folder)


def secrets_in(text: str, name: str, token: str | None, folder: Path) -> Iterator[str]:
    """Yield what a text holds that must not be public, without quoting it.

    Args:
        text: to look at.
        name: of the file, for messages; in lists of words only the folder itself counts as a place.
        token: that is used for the push.
        folder: of the model.
    """
    if (token and token in text) or TOKEN.search(text):
        yield f"{name} holds an access token; remove it, and revoke it if it was ever shared"
    if _KEY in text and "PRIVATE KEY-----" in text:
        yield f"{name} holds a private key"
    words = name.rpartition("/")[2] in _WORD_LISTS
    places = {str(folder)} if words else {str(folder), str(Path.home()), tempfile.gettempdir()} - {"/"}
    own = any(re.search(rf"(?<![\w.]){re.escape(place)}(?![\w-])", text) for place in places)
    if own or (not words and _HOME.search(text)):
        yield f"{name} names a place on this machine, such as a home folder; remove it"


def _text_of(path: Path) -> str | None:
    """Return the text of a file, of a weight file that of its header; None for others."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as handle:
                return json.dumps({**(handle.metadata() or {}), "tensors": list(handle.keys())})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path.name}: not a readable safetensors file: {error}") from error
    if path.suffix in _TEXT or path.name in KNOWN_NAMES:
        return path.read_text(encoding="utf-8", errors="replace")
    return None
