"""SIGKILL in the middle of runs and saves: a run goes on to the same bytes, a save leaves the old model or the new.

Runs of compression with a journal are killed at random moments, and so are the runs that resume them. Saves over an
older model are killed at random moments and, since most of a save is writing where nothing can go wrong, before each
single one of their file operations, too. Both ways of putting a folder in place have to stand it: swapping names in
one step, and renaming twice where the system cannot swap.

Every killed process is forked from a server that has imported everything, so that moments are spread over the work.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_lowbit import ARBConfig, RunOptions
from hf_lowbit.hf import save
from tests.drills.process import check
from tests.tiny import VOCABULARY, tiny_model

FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "ctypes.dlsym")
SHARD = "40KB"


class Server:
    """Starts functions of this module in processes that have imported everything already."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        finish(self.start(int))  # the first one waits for the imports

    def start(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Start a process; what it writes is dropped."""
        process = self._context.Process(target=_silent, args=(function, *arguments))
        process.start()
        return process


def _silent(function: Callable[..., Any], *arguments: Any) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    torch.set_num_threads(1)
    function(*arguments)


def finish(process: Any) -> None:
    """Wait for a process.

    Raises:
        RuntimeError: it failed.
    """
    process.join()
    if process.exitcode:
        raise RuntimeError(f"a process ended with {process.exitcode} on its own")


def _kill_after(process: Any, seconds: float) -> bool:
    """Kill a process after some time; False if it was done before."""
    process.join(seconds)
    process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a process ended with {process.exitcode} on its own")
    return bool(process.exitcode)


def content(folder: Path) -> dict[str, bytes] | None:
    """Return all files of a folder, None if there is no such folder."""
    if not folder.exists():
        return None
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Runs ------------------------------------------------------------------------------------------------------------


def compress(dense: Path, journal: Path, target: Path, calibrated: bool, sequences: int) -> None:
    """Compress with a journal, going on where it ends, and save."""
    tokens = torch.randint(3, VOCABULARY, (sequences, 32), generator=torch.Generator().manual_seed(0))
    config = ARBConfig(
        calibration=tokens if calibrated else None,
        samples=sequences,
        sequence_length=32,
        block_size=32,
        iterations=2,
        quantiles=5,
        max_salient_per_block=6,
        run=RunOptions(progress=False, journal=journal, resume=True),
    )
    save.save_model(AutoModelForCausalLM.from_pretrained(dense, quantization_config=config), target)


def _finished_groups(journal: Path) -> int:
    lines = journal / "journal.jsonl"
    return max(0, lines.read_bytes().count(b"\n") - 1) if lines.exists() else 0


def kill_runs(server: Server, folder: Path, calibrated: bool, trials: int, kills: int, blocks: int) -> dict[str, Any]:
    """Kill runs at random moments, and the runs that resume them, and compare what comes out in the end.

    Returns:
        How many runs were killed, how many groups of layers they had finished then, and how many differ in the end.
    """
    dense = folder / "dense"
    if not dense.exists():
        tiny_model(num_hidden_layers=blocks).save_pretrained(dense)
    rng = random.Random(int(calibrated))
    work = folder / f"runs-{calibrated}"
    work.mkdir()
    began = time.perf_counter()
    finish(server.start(compress, dense, work / "journal", work / "model", calibrated, 4))
    duration = time.perf_counter() - began
    expected, groups = content(work / "model"), _finished_groups(work / "journal")
    found: list[int] = []
    differing = 0
    for trial in range(trials):
        journal, target = work / f"journal-{trial}", work / f"model-{trial}"
        wanted = len(found) + kills
        while len(found) < wanted:
            process = server.start(compress, dense, journal, target, calibrated, 4)
            if _kill_after(process, rng.uniform(0, duration)):
                found.append(_finished_groups(journal))
            shutil.rmtree(target, ignore_errors=True)  # of a run that was done before it could be killed
        finish(server.start(compress, dense, journal, target, calibrated, 4))
        differing += content(target) != expected
        remains = [path.name for path in work.iterdir() if path.name.startswith(".model")]
        differing += bool(remains)
    return {
        "kills": len(found),
        "finished groups when killed": sorted(found),
        "groups": groups,
        "trials": trials,
        "differing": differing,
    }


# Saves -----------------------------------------------------------------------------------------------------------


def save_over(source: Path, target: Path, exchange: bool, stop: int | None, ready: Path, counted: Path) -> None:
    """Load a model and save it over another one.

    Args:
        source: folder of the new model.
        target: folder of the old model.
        exchange: whether the two may swap names in one step.
        stop: number of the file operation before which the process kills itself, None for none.
        ready: file that is made when saving begins.
        counted: file that receives the names of all file operations, a line each.
    """
    model = AutoModelForCausalLM.from_pretrained(source)
    if not exchange:
        save._exchange = lambda *paths: False
    operations: list[str] = []

    def before(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_OPERATIONS:
            if stop == len(operations):
                os.kill(os.getpid(), signal.SIGKILL)
            operations.append(event)

    ready.touch()
    sys.addaudithook(before)
    save.save_model(model, target, overwrite=True, max_shard_size=SHARD)
    counted.write_text("\n".join(operations))


class SaveDrill:
    """Kills saves of one kind and judges what they leave."""

    def __init__(self, server: Server, folder: Path, exchange: bool) -> None:
        self.server, self.exchange = server, exchange
        self.source, self.target = folder / "new", folder / "there" / "model"
        self.old, self.counted, self.ready = folder / "old", folder / "operations", folder / "ready"
        self.target.parent.mkdir(exist_ok=True)
        self.states = {"old": self.old, "new": self.source}
        self.found = {"old": 0, "new": 0, "put back": 0, "wrong": 0}

    def begin(self, stop: int | None) -> tuple[Any, float]:
        """Start a save over a fresh copy of the old model; return the process and when saving began."""
        shutil.rmtree(self.target.parent)
        shutil.copytree(self.old, self.target)
        self.ready.unlink(missing_ok=True)
        process = self.server.start(save_over, self.source, self.target, self.exchange, stop, self.ready, self.counted)
        while process.exitcode is None and not self.ready.exists():
            time.sleep(0.001)
        return process, time.perf_counter()

    def judge(self) -> None:
        """Look at what a killed save left: at once, or after the next look of a user where two renames are needed."""
        if not self.exchange and not self.target.exists():
            self.found["put back"] += 1
        if not self.exchange:
            save.check_target(self.target, overwrite=True)
        there = content(self.target)
        state = next((name for name, folder in self.states.items() if content(folder) == there), "wrong")
        if state != "wrong":
            AutoModelForCausalLM.from_pretrained(self.target)
        save.check_target(self.target, overwrite=True)
        if [path.name for path in self.target.parent.iterdir()] != [self.target.name]:
            state = "wrong"
        self.found[state] += 1


def kill_saves(server: Server, folder: Path, exchange: bool, moments: int, operations: int | None) -> dict[str, Any]:
    """Kill saves at random moments and before their file operations.

    Args:
        server: starts the processes.
        folder: to work in.
        exchange: whether folders may swap names in one step.
        moments: number of random moments.
        operations: how many file operations to kill before, None for each of them.
    """
    drill = SaveDrill(server, folder, exchange)
    process, began = drill.begin(None)
    finish(process)
    duration = time.perf_counter() - began
    names = drill.counted.read_text().splitlines()
    rng = random.Random(int(exchange))
    kills = 0
    while kills < moments:
        process, _ = drill.begin(None)
        if _kill_after(process, rng.uniform(0, duration)):
            kills += 1
            drill.judge()
    at_the_end = [i for i, name in enumerate(names) if name in ("os.rename", "ctypes.dlsym")]
    chosen = list(range(len(names)))
    if operations is not None:
        last = [i for i in (*at_the_end, *(i + 1 for i in at_the_end)) if i < len(names)][-operations:]
        chosen = sorted({*last, *rng.sample(chosen, max(0, operations - len(last)))})
    for stop in chosen:
        process, _ = drill.begin(stop)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        drill.judge()
    return {"kills": kills, "file operations": len(names), "killed before": len(chosen), **drill.found}


def drill(small: bool = False) -> dict[str, Any]:
    """Kill, and compare with the requirements."""
    trials, kills, blocks, moments, operations = (1, 1, 2, 1, 2) if small else (10, 3, 6, 10, None)
    server = Server()
    figures: dict[str, Any] = {"checks": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, calibrated in (("calibrated", True), ("without data", False)):
            found = figures[kind] = kill_runs(server, folder, calibrated, trials, kills, blocks)
            requirement = f"{kind} run, killed and resumed: the same bytes in the end"
            told = f"{found['trials'] - found['differing']} of {found['trials']}, after {found['kills']} kills"
            figures["checks"].append(check(requirement, told, not found["differing"]))
        for number, path in enumerate((folder / "old", folder / "new")):
            model = AutoModelForCausalLM.from_pretrained(folder / "runs-False" / "model")
            model.model.norm.weight.data.fill_(1 + number)
            save.save_model(model, path, max_shard_size=SHARD)
        for kind, exchange in (("swapping names", True), ("renaming twice", False)):
            found = figures[kind] = kill_saves(server, folder, exchange, moments, operations)
            requirement = f"save over a model, {kind}, killed: the old or the new one, complete, and no remains"
            told = f"{found['old']} old, {found['new']} new, {found['wrong']} neither, after {found['kills']} kills"
            told += f"; {found['put back']} put back at the next look" if not exchange else ""
            figures["checks"].append(check(requirement, told, not found["wrong"]))
    return figures
