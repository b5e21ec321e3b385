"""The same compression by one process and by two: time, memory of each, and how far the results are from each other.

    python -m benchmarks.processes [--blocks 4]     # writes benchmarks/results/scale/processes.json

The first blocks of SmolLM2-135M go through the command line of the package, one thread for each process. The time is
that of the run as the command reports it, without the start of Python; CPU seconds of the busiest process, with it,
stand beside it, because they hardly depend on what else the machine does. A case that is in the result file already is
kept, so that the benchmark can be interrupted; ``--anew`` measures all again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import assets
from benchmarks.common import RESULTS, ROOT, write_result

DATA = ["--samples", "16", "--sequence-length", "256", "--batch-size", "2"]
CASES: dict[str, tuple[str, list[str]]] = {
    "ARB, calibrated": ("arb", [*DATA, "--option", "iterations=3", "--option", "quantiles=21"]),
    "PBS²P, calibrated": ("pbs2p", [*DATA, "--option", "iterations=3", "--option", "quantiles=21"]),
    "AdaSVD, calibrated": ("adasvd", DATA),
    "ReCalKV, calibrated": ("recalkv", DATA),
    "DVD-Quant, no data": ("dvd_quant", ["--option", "layers=all"]),
}
PROCESSES = (1, 2)


def measured(arguments: list[str], processes: int) -> dict[str, Any]:
    """Run ``hf-lowbit quantize`` and return its seconds, and CPU seconds and peak memory in MB of each process.

    Raises:
        RuntimeError: it failed.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        "-m",
        "hf_lowbit",
        "quantize",
        *arguments,
        "--json",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    peaks: dict[int, float] = {}
    cpu: dict[int, float] = {}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=out, stderr=log, env=environment, cwd=ROOT)
        while process.poll() is None:
            time.sleep(0.05)
            for pid in [process.pid, *_children(process.pid)]:
                peaks[pid] = max(peaks.get(pid, 0.0), _highest(pid))
                cpu[pid] = max(cpu.get(pid, 0.0), _cpu(pid))
        log.seek(0)
        if process.returncode:
            raise RuntimeError(f"ended with {process.returncode}: {log.read().decode(errors='replace')[-2000:]}")
        out.seek(0)
        seconds = json.loads(out.read())["seconds"]
    workers = sorted(peaks, key=lambda pid: peaks[pid])[-processes:]  # torchrun itself takes less
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": [round(cpu[pid], 1) for pid in workers],
        "peak_mb": [round(peaks[pid]) for pid in workers],
    }


def _children(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def _cpu(pid: int) -> float:
    """Return the CPU seconds of a process so far, 0 when it has ended."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _highest(pid: int) -> float:
    """Return the highest resident memory of a process so far in MB, 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM")), 0.0)


def compared(one: Path, two: Path) -> dict[str, Any]:
    """Return the share of bytes of weights that differ, and the largest relative difference of a layer's error."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, two))
    pairs = [
        (a.contiguous().view(torch.uint8), theirs[name].contiguous().view(torch.uint8)) for name, a in ours.items()
    ]
    differing = sum(int((a != b).sum()) for a, b in pairs)
    tables = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (one, two)]
    errors = [{name: row["error"] for name, row in table["modules"].items()} for table in tables]
    gaps = [abs(errors[1][name] - error) / error for name, error in errors[0].items() if error]
    same = {name: row["spec"] for name, row in tables[0]["modules"].items()} == {
        name: row["spec"] for name, row in tables[1]["modules"].items()
    }
    return {
        "bytes": sum(a.numel() for a, _ in pairs),
        "differing": differing,
        "largest_error_gap": max(gaps, default=0.0),
        "same_plan": same,
    }


def main() -> None:
    """Parse arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--only", action="append", choices=list(CASES))
    parser.add_argument("--anew", action="store_true")
    arguments = parser.parse_args()
    path = RESULTS / "scale" / "processes.json"
    known = json.loads(path.read_text()) if path.exists() and not arguments.anew else {}
    cases = known.get("cases", {}) if known.get("blocks") == arguments.blocks else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = assets.smollm2()
        dense = AutoModelForCausalLM.from_pretrained(path, num_hidden_layers=arguments.blocks)
        dense.save_pretrained(folder / "dense")
        AutoTokenizer.from_pretrained(path).save_pretrained(folder / "dense")
        for case, (method, options) in CASES.items():
            if case in cases or (arguments.only and case not in arguments.only):
                continue
            data = ["--calibration", str(assets.wikipedia("calibration"))] if options[:1] == DATA[:1] else []
            row: dict[str, Any] = {}
            for count in PROCESSES:
                out = folder / f"{method}-{count}"
                row[str(count)] = measured(
                    [str(folder / "dense"), str(out), "--method", method, *data, *options], count
                )
            cases[case] = {**row, **compared(*(folder / f"{method}-{count}" for count in PROCESSES))}
            write_result("scale/processes", {"blocks": arguments.blocks, "cases": cases})
            print(case, cases[case])


if __name__ == "__main__":
    main()
