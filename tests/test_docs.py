"""The documents tell the truth: tables come from result files, named files, targets and names exist."""

import ast
import re
from pathlib import Path

import pytest

import hf_lowbit
from benchmarks.report import documents
from hf_lowbit import registry

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.parent.name + "-" + path.name)
def test_tables_are_rendered_from_result_files(path):
    assert path.read_text(encoding="utf-8") == documents()[path], "run python -m benchmarks.report"


@pytest.mark.parametrize("page", PAGES)
def test_named_files_and_targets_exist(page):
    text = read(page)
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), flags=re.MULTILINE))
    for target in re.findall(r"`make ([\w-]+)`|^make ([\w-]+)", text, flags=re.MULTILINE):
        assert (target[0] or target[1]) in targets
    for module in re.findall(r"python -m ([\w.]+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for name in re.findall(r"\]\(([^)#]+)\)", text):
        assert name.startswith("https://") or (ROOT / page).parent.joinpath(name).exists(), name
    for name in re.findall(r"`([\w./]+/[\w./-]*\w\.(?:py|md|toml|txt))`", text):
        assert (ROOT / name).exists(), name


def test_readme_code_parses_and_its_names_exist():
    blocks = re.findall(r"```python\n(.*?)```", read("README.md"), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "hf_lowbit":
                assert all(hasattr(hf_lowbit, alias.name) for alias in node.names)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ARBConfig":
                assert all(keyword.arg in hf_lowbit.ARBConfig.__dataclass_fields__ for keyword in node.keywords)


def test_readme_lists_every_method():
    text = read("README.md")
    for method in registry.methods().values():
        assert f"`{method.config.__name__}`" in text
        assert method.paper in text


def test_ci_runs_the_test_command_of_the_readme():
    commands = [line.split("#")[0].strip() for line in read("README.md").splitlines()]
    assert "make test" in commands
    assert re.search(r"^make test$", read(".ci/run"), flags=re.MULTILINE)


def test_every_public_name_is_documented():
    for name in hf_lowbit.__all__:
        assert getattr(hf_lowbit, name).__doc__, name
