"""``hf-lowbit env``: tells what a bug report needs, and nothing that should not be in public."""

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from typer.testing import CliRunner

import hf_lowbit
import hf_lowbit.kernels.cpu.binary as cpu
from hf_lowbit.cli import app
from hf_lowbit.report import environment

SECRET = "hf_Zq8SecretTokenZq8"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    result = CliRunner().invoke(app, ["env", "--json"])
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def test_versions(found: dict[str, Any]) -> None:
    packages = found["packages"]
    assert packages["hf_lowbit"] == hf_lowbit.__version__
    assert packages["python"] == platform.python_version()
    for name in ("torch", "transformers", "accelerate", "huggingface_hub", "safetensors", "tokenizers"):
        assert packages[name] == version(name)
    assert {"diffusers", "triton", "peft"} <= set(packages)


def test_machine(found: dict[str, Any]) -> None:
    machine = found["machine"]
    assert machine["system"].startswith(platform.system())
    assert machine["logical_cores"] == psutil.cpu_count()
    assert machine["memory"] == psutil.virtual_memory().total
    assert found["torch"]["threads_of_torch"] == torch.get_num_threads()
    assert found["torch"]["instructions_of_torch"] == torch.backends.cpu.get_cpu_capability()
    if "AVX512" in found["torch"]["instructions_of_torch"]:
        assert "avx512f" in machine["instructions"]
    assert found["devices"][0]["kind"] == "cpu"
    assert [device["kind"] for device in found["devices"]].count("cuda") == torch.cuda.device_count()


def test_registration(found: dict[str, Any]) -> None:
    assert found["integration"] == {
        "registered_with_transformers": True,
        "registered_with_diffusers": True if find_spec("diffusers") else None,
        "entry_point_installed": True,
        "autoload_of_hf_lowbit": "on",
        "autoload_of_torch": "on",
    }


@pytest.mark.parametrize(
    ("switch", "key"),
    [("HF_LOWBIT_AUTOLOAD", "autoload_of_hf_lowbit"), ("TORCH_DEVICE_BACKEND_AUTOLOAD", "autoload_of_torch")],
)
def test_switches_are_seen(monkeypatch: pytest.MonkeyPatch, switch: str, key: str) -> None:
    before = list(sys.meta_path)
    monkeypatch.setenv(switch, "0")
    seen = environment.environment()["integration"]
    assert seen.pop(key) == "switched off"
    assert "switched off" not in seen.values()
    assert sys.meta_path == before


def test_every_op_of_the_package_is_listed_for_every_kind_of_device(found: dict[str, Any]) -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("hf_lowbit::")}
    assert names >= {"hf_lowbit::binary_linear", "hf_lowbit::binary_dequantize"}
    kinds = {device["kind"] for device in found["devices"]}
    assert {(row["op"], row["device"]) for row in found["kernels"]} == {(n, k) for n in names for k in kinds}


def test_which_kernel_an_op_takes_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [{"kind": kind} for kind in ("cpu", "cuda", "cuda", "mps")]
    monkeypatch.setattr(environment, "devices", lambda: devices)
    monkeypatch.setattr(cpu, "load", lambda: (None, "it was not built"))
    rows = [row for row in environment.kernels() if row["op"] == "hf_lowbit::binary_linear"]
    assert [row["device"] for row in rows] == ["cpu", "cuda", "mps"]
    assert rows[0]["backend"] == "reference"
    assert "cpu cannot: no compiled library: it was not built" in rows[0]["why"]
    assert "cpu cannot: tensors on mps" in rows[2]["why"]
    monkeypatch.setattr(cpu, "load", lambda: (object(), "avx2"))
    taken = {row["device"]: row["backend"] for row in environment.kernels()}
    assert taken["cpu"] == "cpu"


def test_the_tables_say_the_same(found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0
    for text in (*found["packages"].values(), found["machine"]["processor"], *(row["op"] for row in found["kernels"])):
        assert text in result.stdout
    assert result.stdout.rstrip().endswith("paste this into a bug report")


def test_missing_packages_are_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no_such_package_at_all"))
    assert environment.packages()["no_such_package_at_all"] == "not installed"


def test_a_broken_library_is_a_line_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError(f"/home/somebody/{SECRET}: cannot be loaded")

    for name in ("_torch", "devices", "_integration", "kernels", "_compiler"):
        monkeypatch.setattr(environment, name, broken)
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("cannot be told: OSError") == 5
    assert SECRET not in result.output
    assert "somebody" not in result.output


def test_nothing_private_is_shown(tmp_path: Path) -> None:
    """In a process of its own, in a home and a folder with telling names, with tokens in its environment."""
    home = tmp_path / "home-of-Zq8user"
    home.mkdir()
    planted = {name: SECRET for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "CXX", "CC", "TRITON_CACHE_DIR")}
    planted |= {"HOME": str(home), "USER": "Zq8user", "LOGNAME": "Zq8user", "HF_HOME": str(home), "COLUMNS": "300"}
    code = (
        "from hf_lowbit.cli import app\nfor words in (['env'], ['env', '--json']): app(words, standalone_mode=False)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **planted}, cwd=home, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr
    assert shown.count(torch.__version__) == 2
    private = [SECRET, "Zq8", socket.gethostname(), platform.node(), sys.prefix, sys.executable, tempfile.gettempdir()]
    private += [os.path.expanduser("~"), str(Path(hf_lowbit.__file__).parent), str(Path(torch.__file__).parent)]
    for text in private:
        assert len(text) < 4 or text not in shown
