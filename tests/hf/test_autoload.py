"""Programs that never import hf_lowbit load packed models; switching that off fails loudly; nothing breaks torch.

Each case is a process of its own, since what is tested happens while torch and transformers are imported. They need
the package to be installed: the hook is an entry point.
"""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from transformers import AutoModelForCausalLM

from hf_lowbit import RunOptions
from tests.hf.test_transformers import quick
from tests.tiny import tiny_model

LOAD = (
    "model = AutoModelForCausalLM.from_pretrained({path!r}); print(type(model.model.layers[0].mlp.up_proj).__name__)"
)


@pytest.fixture(scope="module")
def packed_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoload")
    tiny_model(num_hidden_layers=1).save_pretrained(folder / "dense")
    config = quick(calibration=None, run=RunOptions(progress=False))
    AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config).save_pretrained(
        folder / "packed"
    )
    return str(folder / "packed")


def run(code: str, folder: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own; ``folder`` is where it runs and the first place it imports from."""
    command, variables = [sys.executable, "-c", code], {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=folder)


def test_entry_point_is_installed():
    assert [point.value for point in entry_points(group="torch.backends") if point.name == "hf_lowbit"] == [
        "_hf_lowbit_autoload:autoload"
    ]


@pytest.mark.parametrize(
    "first",
    [
        "",
        "import transformers.quantizers.auto\n",
        pytest.param("import torch\n", marks=pytest.mark.slow),
        pytest.param("import transformers.modeling_utils\n", marks=pytest.mark.slow),
    ],
    ids=["nothing", "quantizers", "torch", "modeling"],
)
def test_loads_without_importing_the_package(packed_path, first):
    done = run(first + "from transformers import AutoModelForCausalLM\n" + LOAD.format(path=packed_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["PackedLinear"]
    assert "hf_lowbit could not" not in done.stderr


@pytest.mark.parametrize(
    "switch",
    ["HF_LOWBIT_AUTOLOAD", pytest.param("TORCH_DEVICE_BACKEND_AUTOLOAD", marks=pytest.mark.slow)],
)
def test_switched_off_fails_loudly_and_importing_still_works(packed_path, switch):
    load = "from transformers import AutoModelForCausalLM\n" + LOAD.format(path=packed_path)
    done = run(load, **{switch: "0"})
    assert done.returncode != 0
    assert "mismatch" in done.stderr or "size" in done.stderr
    done = run("import hf_lowbit\n" + load, **{switch: "0"})
    assert done.stdout.split() == ["PackedLinear"], done.stderr


def test_importing_torch_is_silent_and_does_not_load_the_package():
    done = run("import torch, sys; print('hf_lowbit' in sys.modules, 'transformers' in sys.modules)")
    assert done.stdout.split() == ["False", "False"]
    assert done.stderr == ""


def test_a_broken_package_breaks_neither_torch_nor_transformers(tmp_path):
    """Only a warning, from the last attempt."""
    (tmp_path / "hf_lowbit").mkdir()
    (tmp_path / "hf_lowbit" / "__init__.py").write_text("raise RuntimeError('broken on purpose')\n")
    code = "import torch, transformers.modeling_utils; print(torch.ones(2).sum().item())"
    done = run(code, folder=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2.0"]
    assert done.stderr.count("broken on purpose") == 1


def test_a_broken_finder_does_not_break_torch():
    code = "import sys\nclass List(list):\n    def insert(self, *a): raise RuntimeError\n"
    code += "sys.meta_path = List(sys.meta_path)\nimport torch; print(torch.ones(2).sum().item())"
    done = run(code)
    assert done.stdout.split() == ["2.0"], done.stderr


def test_installed_once():
    code = "import torch, sys, _hf_lowbit_autoload as a; a.autoload(); a.autoload()\n"
    code += "print(sum(isinstance(f, a.Finder) for f in sys.meta_path))"
    assert run(code).stdout.split() == ["1"]
