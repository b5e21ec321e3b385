"""Run tests with every version of transformers that the package promises to work with.

    python -m tests.matrix [--versions 5.20.0 5.21.1] [--tests tests/hf/test_life_cycle.py] [--workers 2]

Each version is installed without its dependencies into a folder of its own, which comes before the installed packages
in a fresh Python process. So all versions run with the same torch, accelerate, peft and so on; where these are not
what a version asks for, the table says so, and a version that cannot be imported with them counts as failed.

Without ``--versions``: of those the package index offers, the oldest that pyproject.toml allows and the newest of
every minor release.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from assets import cache_folder

ROOT = Path(__file__).parent.parent
NAME = "transformers"


@dataclasses.dataclass
class Outcome:
    """What came of one version.

    Attributes:
        version: of transformers.
        counts: tests by outcome: passed, failed (errors included), skipped.
        seconds: of the tests.
        failures: what failed with the first line of the reason; also why nothing could be run.
        unmet: requirements of this version that the installed packages do not meet.
    """

    version: str
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    unmet: list[str] = dataclasses.field(default_factory=list)


def offered() -> list[str]:
    """Versions in the package index."""
    command = [sys.executable, "-m", "pip", "index", "versions", NAME]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = re.search(r"^Available versions: (.*)$", text, flags=re.MULTILINE)
    if line is None:
        raise RuntimeError(f"pip lists no versions of {NAME}: {text}")
    return [version.strip() for version in line[1].split(",")]


def chosen(versions: list[str]) -> list[str]:
    """The oldest version that the package's metadata allows, and the newest of each minor release, in order."""
    requirements = map(Requirement, metadata.requires("hf-lowbit") or [])
    allowed = next(requirement.specifier for requirement in requirements if requirement.name == NAME)
    known = sorted(Version(version) for version in versions if allowed.contains(version))
    newest = {version.release[:2]: version for version in known}
    return [str(version) for version in sorted({*known[:1], *newest.values()})]


def overlay(version: str, folder: Path) -> Path:
    """Folder with this version alone in it, installed the first time."""
    target = folder / f"{NAME}-{version}"
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{work}/site"]
            done = subprocess.run([*command, f"{NAME}=={version}"], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"pip could not install {NAME} {version}: {done.stderr.strip().splitlines()[-1]}")
            Path(work, "site").rename(target)
    return target


def unmet_requirements(site: Path | None) -> list[str]:
    """What the transformers in ``site`` (None: the installed one) asks for and does not find."""
    found = metadata.distribution(NAME) if site is None else next(iter(metadata.distributions(path=[str(site)])))
    problems = []
    for requirement in map(Requirement, found.requires or []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{requirement} (not installed)")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            problems.append(f"{requirement} (installed: {installed})")
    return problems


def run(version: str, site: Path | None, tests: list[str], workers: int) -> Outcome:
    """Run the tests with the transformers in ``site`` (None: the installed one)."""
    outcome = Outcome(version, unmet=unmet_requirements(site))
    paths = [*([] if site is None else [str(site)]), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    question = [sys.executable, "-c", f"import {NAME}.modeling_utils; print({NAME}.__version__)"]
    answer = subprocess.run(question, capture_output=True, text=True, check=False, env=environment)
    if answer.stdout.strip() != version:
        said = (answer.stderr.strip() or f"version {answer.stdout.strip()} was imported instead").splitlines()[-1]
        outcome.failures["import"] = said
        return outcome
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        report = Path(work) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        if workers > 1:
            command += ["-n", str(workers)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
        if report.is_file():
            read_report(report, outcome)
    outcome.seconds = time.perf_counter() - began
    if done.returncode != 0 and not outcome.failures:  # nothing collected, a crash, an interruption
        outcome.failures["pytest"] = f"exit status {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}"
    return outcome


def read_report(file: Path, outcome: Outcome) -> None:
    """Count what a JUnit file of pytest lists."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(file).iter("testcase"):  # noqa: S314 - written by the process above
        problem = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        if problem is not None:
            counts["failed"] += 1
            message = (problem.get("message") or "").strip() or "no message"
            outcome.failures[f"{case.get('classname')}::{case.get('name')}"] = message.splitlines()[0]
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    outcome.counts = counts


def table(outcomes: list[Outcome]) -> Table:
    """One row for each version."""
    shown = Table("transformers", "passed", "failed", "skipped", "seconds")
    shown.add_column("unmet requirements", overflow="fold")
    for outcome in outcomes:
        counts = [str(outcome.counts.get(kind, "–")) for kind in ("passed", "failed", "skipped")]
        shown.add_row(outcome.version, *counts, f"{outcome.seconds:.0f}", escape("; ".join(outcome.unmet)) or "none")
    return shown


def main() -> int:
    """Return 0 if every test passed with every version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", help="of transformers; those the package index offers by default")
    parser.add_argument("--tests", nargs="+", default=["tests/hf"], help="files and folders for pytest")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the tests of a version")
    parser.add_argument(
        "--cache", type=Path, default=cache_folder().parent / NAME, help="folder for what is installed"
    )
    arguments = parser.parse_args()
    console = Console()
    installed = metadata.version(NAME)
    outcomes = []
    for version in arguments.versions or chosen(offered()):
        try:
            site = None if version == installed else overlay(version, arguments.cache.resolve())
            outcome = run(version, site, arguments.tests, arguments.workers)
        except RuntimeError as error:
            outcome = Outcome(version, failures={"install": str(error)})
        outcomes.append(outcome)
        counted = ", ".join(f"{number} {kind}" for kind, number in outcome.counts.items()) or "nothing ran"
        console.print(f"{NAME} {version}: {counted} in {outcome.seconds:.0f} s", highlight=False)
    console.print(table(outcomes))
    for outcome in outcomes:
        for name, message in outcome.failures.items():
            console.print(f"{outcome.version} {name}: {message}", highlight=False, markup=False, soft_wrap=True)
    return 1 if any(outcome.failures for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
