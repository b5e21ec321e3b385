"""What a bug report should say about a machine: versions, processor, devices, and which kernel every op takes.

It is made to be pasted in public, so it holds no path, no name of a user or host, no environment variable and no
message of an error (which may quote any of them). And it is most needed where something is broken: a library that
cannot be imported is a line of the report, not the end of it.
"""

from __future__ import annotations

import functools
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table
from rich.text import Text

ABSENT = "not installed"
_PACKAGES = (
    *("torch", "transformers", "accelerate", "diffusers", "huggingface_hub", "safetensors", "tokenizers"),
    *("triton", "peft"),
)
# Instructions that kernels for packed weights can use, as Linux names them on x86 and on ARM.
_INSTRUCTIONS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "sve", "sve2"),
)
_COMPILERS = ("c++", "g++", "clang++")
_VERSION = re.compile(r"\d+(\.\d+)+")


def environment() -> dict[str, Any]:
    """Return all that is known, as JSON types: section, then name, then value; sizes in bytes.

    ``kernels`` is a list with a row for each op and kind of device: ``op``, ``device``, ``backend`` and ``why``.
    """
    return {
        "packages": packages(),
        "machine": machine(),
        "torch": _or_failure(_torch),
        "devices": _or_failure(devices),
        "integration": _or_failure(_integration),
        "kernels": _or_failure(kernels),
    }


def _or_failure(ask: Callable[[], Any]) -> Any:
    """Return an answer, or in one line that it cannot be had: whatever is broken, the rest is still reported."""
    try:
        return ask()
    except Exception as error:
        return f"cannot be told: {type(error).__name__}"  # not the message, which may quote a path


def packages() -> dict[str, str]:
    """Return the versions of Python, of this package and of those that it works with."""
    from hf_lowbit import __version__

    found = {"hf_lowbit": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name) or "unknown"  # None where its record is damaged
        except metadata.PackageNotFoundError:
            found[name] = ABSENT
    return found


def machine() -> dict[str, Any]:
    """Return system, processor, its instructions, memory and compiler."""
    system = " ".join([platform.system(), *_versions(platform.release())[:1], platform.machine()])
    return {
        "system": system,
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": _usable_cores(),
        "instructions": _instructions(),
        "memory": psutil.virtual_memory().total,
        "compiler": _or_failure(_compiler),
    }


def _versions(text: str) -> list[str]:
    """Return the version numbers in a text that may hold anything else."""
    return [match.group() for match in _VERSION.finditer(text)]


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """Return the first processor of Linux' list, empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _processor() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _instructions() -> list[str] | None:
    """Return what the processor can do of what matters here, None where the system does not say."""
    listed = _cpuinfo().get("flags", _cpuinfo().get("Features"))
    return None if listed is None else [name for name in _INSTRUCTIONS if name in listed.split()]


def _usable_cores() -> int | None:
    """Return how many logical cores this process may use; containers and schedulers give less than there are."""
    affinity = getattr(psutil.Process(), "cpu_affinity", None)
    return None if affinity is None else len(affinity())


def _compiler() -> str:
    """Return name and version of the C++ compiler, if there is one."""
    for name in _COMPILERS:
        path = shutil.which(name)
        if path is not None and Path(path).is_absolute():  # one in the current folder may be anybody's
            done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=20)  # noqa: S603
            line = done.stdout.partition("\n")[0]
            return " ".join([name, *(["(clang)"] if "clang" in line else []), *_versions(line)[:1]])
    return "none found"


def _torch() -> dict[str, Any]:
    import torch

    return {
        "cuda_build": torch.version.cuda,
        "rocm_build": torch.version.hip,
        "threads_of_torch": torch.get_num_threads(),
        "threads_between_ops": torch.get_num_interop_threads(),
        "instructions_of_torch": torch.backends.cpu.get_cpu_capability(),
    }


def devices() -> list[dict[str, Any]]:
    """Return the devices that torch can use: kind, name and memory; no context is made on them."""
    import torch

    found: list[dict[str, Any]] = [
        {"kind": "cpu", "name": _processor(), "memory": psutil.virtual_memory().total, "capability": None}
    ]
    for kind in ("cuda", "xpu"):
        module: Any = getattr(torch, kind, None)
        for number in range(module.device_count() if module is not None and module.is_available() else 0):
            device = module.get_device_properties(number)
            major, minor = getattr(device, "major", None), getattr(device, "minor", None)
            capability = None if major is None else f"{major}.{minor}"
            row = {"kind": kind, "name": device.name, "memory": device.total_memory, "capability": capability}
            found.append(row)
    if torch.backends.mps.is_available():
        found.append({"kind": "mps", "name": _processor(), "memory": None, "capability": None})
    return found


def _integration() -> dict[str, Any]:
    """Return whether both libraries know this package, here and in programs that do not import it."""
    import torch
    import transformers.modeling_utils  # noqa: F401  the package registers when this has been loaded

    from hf_lowbit.hf import transformers as integration
    from hf_lowbit.hf.entry import known_to_diffusers

    points = metadata.entry_points(group="torch.backends")
    switch = getattr(torch, "_is_device_backend_autoload_enabled", None)
    return {
        "registered_with_transformers": integration.NAME
        in integration.registry_of_transformers.AUTO_QUANTIZER_MAPPING,
        "registered_with_diffusers": _or_failure(known_to_diffusers),
        "entry_point_installed": any(point.name == "hf_lowbit" for point in points),
        "autoload_of_hf_lowbit": "on" if _autoload_installs() else "switched off",
        "autoload_of_torch": None if switch is None else "on" if switch() else "switched off",
    }


def _autoload_installs() -> bool:
    """Return whether the entry point would do its work; that importing this package did so, too, tells nothing."""
    import _hf_lowbit_autoload as auto

    saved = sys.meta_path
    sys.meta_path = [finder for finder in saved if not isinstance(finder, auto.Finder)]
    try:
        auto.autoload()
        return any(isinstance(finder, auto.Finder) for finder in sys.meta_path)
    finally:
        sys.meta_path = saved


def kernels() -> list[dict[str, str]]:
    """Return for every op of the package and every kind of device which kernel runs, and why not another one.

    Asked for the layer that the default options of ARB-LLM make, and for 4 bits in groups of 64 columns;
    `hf-lowbit bench --list` asks for those of a model.
    """
    import torch

    from hf_lowbit.formats import BinaryFormat, BinarySpec, IntegerFormat, IntegerSpec
    from hf_lowbit.kernels import dispatch
    from hf_lowbit.kernels.ops import LIBRARY

    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{LIBRARY.ns}::"))
    spec = BinarySpec(4096, 4096, groups=2, salient=384, salient_groups=2, col_scales=True)
    parts, sizes = BinaryFormat.empty(spec).call_arguments()
    four: dict[str, Any] = {"bits": 4, "group_size": 64, "symmetric": False}
    rounded: dict[str, Any] = {"rotation": 128, "activation": "token_group", "act_group_size": 64}
    integers = IntegerFormat.empty(IntegerSpec(4096, 4096, **four))
    rounding = IntegerFormat.empty(IntegerSpec(4096, 4096, **four, **rounded))
    rows = []
    for kind in dict.fromkeys(device["kind"] for device in devices()):
        by_family = {
            "integer_act": rounding.kernel_reasons(torch.bfloat16, kind),
            "integer": integers.kernel_reasons(torch.bfloat16, kind),
            "": dispatch.reasons(torch.bfloat16, kind, parts, sizes),
        }
        for name in names:
            family = next(family for family in by_family if name.removeprefix(f"{LIBRARY.ns}::").startswith(family))
            found = by_family[family]
            taken = next(name for name, reason in found.items() if reason.startswith("taken"))
            refused = "; ".join(f"{name} {reason}" for name, reason in found.items() if reason.startswith("cannot"))
            why = found[taken].removeprefix("taken: ") + (f" ({refused})" if refused else "")
            rows.append({"op": name, "device": kind, "backend": taken, "why": why})
    return rows


def environment_tables(found: Mapping[str, Any]) -> list[Table]:
    """Return the tables of ``hf-lowbit env`` from what :func:`environment` returned."""
    versions = _table("versions", ["package", "version"], found["packages"].items())
    rows = [(_words(key), _text(key, value)) for key, value in found["machine"].items()]
    for section in ("torch", "integration"):
        content = found[section]
        facts = content.items() if isinstance(content, Mapping) else [(section, content)]
        rows += [(_words(key), _text(key, value)) for key, value in facts]
    return [
        versions,
        _table("machine and libraries", ["what", "value"], rows),
        _list_table("devices", ["kind", "name", "memory", "capability"], found["devices"]),
        _list_table("kernels", ["op", "device", "backend", "why"], found["kernels"]),
    ]


def _words(key: str) -> str:
    return key.replace("_", " ")


def _text(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "memory" and isinstance(value, int):
        return f"{value / 10**9:.1f} GB"
    return ", ".join(value) or "–" if isinstance(value, list) else str(value)


def _list_table(title: str, columns: list[str], found: Any) -> Table:
    """Return a table of rows by name, or of the one line that says why there are none."""
    if isinstance(found, str):
        return _table(title, [""], [(found,)])
    return _table(title, columns, [[_text(name, row[name]) for name in columns] for row in found])


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*map(Text, row))  # as it is: brackets in the name of a device are no markup
    return table
