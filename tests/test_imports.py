"""The rooms of the package and what each may reach for, checked on the source text of every file.

Imports go one way, from the user's side down to the kernels; what may not appear at all is listed below too. Nothing
is imported here, so a file is checked also where its libraries are missing. Imports inside functions and under
``TYPE_CHECKING`` count like all others.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_lowbit"

# A file may import its own room and rooms of a strictly lower rank; two rooms of one rank do not know each other.
RANKS = {
    "errors": 0,
    "kernels": 1,
    "formats": 2,
    "numerics": 2,
    "config": 3,
    "layers": 3,
    "experts": 3,
    "fused_qkv": 3,
    "methods": 4,
    "calibration": 4,
    "compress": 5,
    "cache": 5,
    "hf": 6,
    "serving": 6,
    "cli": 7,
}
# Names of files and folders that share a room.
ROOM_OF = {
    "conv_layers": "layers",
    "registry": "config",
    "recipe": "config",
    "budget": "config",
    "image_config": "config",
    "report": "hf",
    "__main__": "cli",
}

# The registries of these libraries are the business of one folder.
ONLY_IN_HF = ("transformers.quantizers", "diffusers")
ONLY_IN_SERVING = ("vllm",)
NEVER_IMPORTED = ("assets", "tests", "benchmarks", "examples", "pickle", "cPickle", "cloudpickle", "dill", "joblib")
NEVER_NAMED = ("torch.load", "os.environ", "os.getenv", "pickle")
NEVER_CALLED = ("eval", "exec")
MAY_PRINT = ("cli", "report", "__main__")


def violations(package: Path) -> list[str]:
    """One line per forbidden import or name in ``package``, which stands for ``hf_lowbit`` whatever its folder."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        tree = ast.parse(path.read_text("utf-8"), filename=str(path))
        complaints = [*_import_complaints(parts, tree, package), *_name_complaints(parts, tree)]
        found += [f"{path.relative_to(package)}:{line}: {complaint}" for line, complaint in complaints]
    return found


def _import_complaints(parts: tuple[str, ...], tree: ast.Module, package: Path) -> Iterator[tuple[int, str]]:
    for line, target in _imports(parts, tree, package):
        if _is_or_below(target, NEVER_IMPORTED):
            yield line, f"imports {target}, which the package never does"
        if _is_or_below(target, ONLY_IN_HF) and parts[0] != "hf":
            yield line, f"imports {target}, which only hf/ may"
        if _is_or_below(target, ONLY_IN_SERVING) and parts[0] != "serving":
            yield line, f"imports {target}, which only serving/ may"
        if target.split(".")[0] == "hf_lowbit" and parts != ("__init__",):
            complaint = _arrow_complaint(parts, tuple(target.split(".")[1:]))
            if complaint:
                yield line, complaint


def _arrow_complaint(parts: tuple[str, ...], target: tuple[str, ...]) -> str | None:
    """What is wrong with a file at ``parts`` importing ``hf_lowbit.<target>``, or None."""
    if target == ("__version__",):
        return None
    room = ROOM_OF.get(parts[0], parts[0])
    if room not in RANKS:
        return f"is in no known room; give {parts[0]} a rank in {Path(__file__).name}"
    if not target:
        return None if room == "cli" else "imports the whole package; name the module instead"
    target_room = ROOM_OF.get(target[0], target[0])
    if target_room not in RANKS:
        return f"imports {target[0]}, which is in no known room; give it a rank in {Path(__file__).name}"
    if room == target_room == "methods":
        if len(parts) > 2 and len(target) > 1 and target[1] not in (parts[1], "taxonomy"):
            return f"method {parts[1]} imports methods.{target[1]}; move what both need to numerics"
        return None
    if room != target_room and RANKS[target_room] >= RANKS[room]:
        return f"{parts[0]} (rank {RANKS[room]}) imports {target[0]} (rank {RANKS[target_room]})"
    return None


def _imports(parts: tuple[str, ...], tree: ast.Module, package: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a file imports; relative imports made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ("hf_lowbit", *parts)[: -node.level]
                base = ".".join((*above, base) if base else above)
            for alias in node.names:
                # "from hf_lowbit.formats import binary" names a module, "from hf_lowbit.errors import X" does not.
                name = f"{base}.{alias.name}"
                yield node.lineno, name if _is_module(name, package) else base


def _is_module(name: str, package: Path) -> bool:
    first, *rest = name.split(".")
    if first != "hf_lowbit":  # the files of other packages are not looked at; the longer name says more
        return True
    place = package.joinpath(*rest)
    return place.is_dir() or place.with_suffix(".py").is_file() or rest == ["__version__"]


def _name_complaints(parts: tuple[str, ...], tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = _dotted(node)
            if name in NEVER_NAMED:
                yield node.lineno, f"uses {name}"
            if name in ONLY_IN_HF and parts[0] != "hf" and isinstance(node, ast.Attribute):
                yield node.lineno, f"uses {name}, which only hf/ may"
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in NEVER_NAMED:
                    yield node.lineno, f"imports {node.module}.{alias.name}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in NEVER_CALLED:
                yield node.lineno, f"calls {node.func.id}"
            if node.func.id == "print" and parts[0] not in MAY_PRINT:
                yield node.lineno, "calls print; use logging"


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _is_or_below(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def test_the_package_keeps_its_rules() -> None:
    assert PACKAGE.is_dir()
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("kernels/ops.py", "from hf_lowbit.formats import binary"),
        ("kernels/ops.py", "from ..formats.binary import pack"),
        ("kernels/triton/gemm.py", "from ... import formats"),
        ("kernels/ops.py", "import hf_lowbit"),
        ("errors.py", "from hf_lowbit.config import ARBConfig"),
        ("formats/binary.py", "import hf_lowbit.numerics.search"),
        ("numerics/search.py", "def f():\n    from hf_lowbit.formats import bits"),
        ("methods/arb/algorithm.py", "from hf_lowbit.methods.pbs2p import algorithm"),
        ("methods/arb/__init__.py", "from ..pbs2p.algorithm import fit"),
        ("methods/arb/__init__.py", "from hf_lowbit.calibration import stats"),
        ("calibration/capture.py", "from hf_lowbit.methods import arb"),
        ("layers.py", "from hf_lowbit.config import ARBConfig"),
        ("registry.py", "from hf_lowbit.layers import PackedLinear"),
        ("compress/plan.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hf_lowbit import hf"),
        ("cache/layer.py", "from hf_lowbit.compress import plan"),
        ("hf/save.py", "from hf_lowbit.cli import main"),
        ("attic.py", "from hf_lowbit import errors"),
        ("hf/save.py", "from hf_lowbit.attic import thing"),
        ("config.py", "from transformers.quantizers import HfQuantizer"),
        ("config.py", "from transformers import quantizers"),
        ("config.py", "import transformers\nx = transformers.quantizers.HfQuantizer"),
        ("cache/layer.py", "import diffusers"),
        ("report/inspect.py", "from diffusers.models import ModelMixin"),
        ("hf/entry.py", "from vllm import LLM"),
        ("hf/entry.py", "from hf_lowbit.serving import register"),
        ("serving/vllm.py", "from hf_lowbit.hf import entry"),
        ("calibration/data.py", "import assets"),
        ("__init__.py", "from benchmarks.quality import arb"),
        ("hf/save.py", "import pickle"),
        ("hf/save.py", "from torch import load"),
        ("hf/save.py", "import torch\nx = torch.load('f')"),
        ("config.py", "x = eval('1')"),
        ("config.py", "exec('x = 1')"),
        ("config.py", "import os\nx = os.environ.get('X')"),
        ("config.py", "from os import environ"),
        ("compress/run.py", "print('done')"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, source: str) -> None:
    plant(tmp_path, {file: source})
    found = violations(tmp_path)
    assert found
    assert all(line.startswith(f"{file}:") for line in found)


def test_what_is_allowed_raises_no_complaint(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "__init__.py": "from hf_lowbit.hf import transformers\nfrom hf_lowbit.config import ARBConfig",
            "registry.py": "from hf_lowbit.config import ARBConfig\nfrom . import errors",
            "layers.py": "from hf_lowbit.formats import binary\nfrom hf_lowbit.kernels.ops import binary_gemm",
            "methods/arb/__init__.py": "from .algorithm import fit\nfrom ... import registry\nfrom .. import taxonomy",
            "methods/arb/algorithm.py": "from hf_lowbit.numerics import search\nmodel.eval()",
            "hf/card.py": "from ..report import inspect\nfrom hf_lowbit import __version__\nimport diffusers",
            "hf/transformers.py": "from transformers.quantizers import HfQuantizer",
            "report/inspect.py": "from hf_lowbit.hf.save import read\nprint('a table')",
            "serving/vllm.py": "import vllm\nfrom hf_lowbit.compress import plan",
            "cli.py": "import hf_lowbit\nfrom hf_lowbit.hf import hub\nprint('a line')",
        },
    )
    assert violations(tmp_path) == []


def plant(package: Path, files: dict[str, str]) -> None:
    """Write ``files``, and empty ones for what they import, as a package tree in ``package``."""
    empty = [
        "errors.py",
        "config.py",
        "registry.py",
        "layers.py",
        "kernels/ops.py",
        "formats/binary.py",
        "formats/bits.py",
    ]
    empty += ["numerics/search.py", "methods/taxonomy.py", "methods/arb/algorithm.py", "methods/pbs2p/algorithm.py"]
    empty += ["calibration/stats.py", "compress/plan.py", "hf/save.py", "report/inspect.py", "cli.py"]
    for name in empty:
        files = {name: "", **files}
    for name, source in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, "utf-8")
