"""Loading a packed model: how much memory it takes and how long, beside a dense model of as many bytes.

The packed model is Llama-shaped and holds random bits, which no method had to compute: loading does not care. Its
counterpart is a dense Llama with as many bytes in as many tensors, loaded by the same ``from_pretrained``; so what
transformers does per tensor and per byte is in both. transformers leaves tensors mapped to their file, and nothing is
read before the first forward pass. As a model that is never read is of no use, what counts is the time to load it and
to read every byte once; the times of loading alone, and of reading the file without transformers, stand beside it.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_lowbit import ARBConfig, PackedLinear, RunOptions
from hf_lowbit.formats.binary import BinaryFormat, BinarySpec
from hf_lowbit.hf.save import save_model
from hf_lowbit.hf.transformers import LowBitHfQuantizer
from hf_lowbit.kernels import pack_plane
from tests.drills.process import MB, called, check, watched

VOCABULARY = 1000
ALLOWED_MEMORY, ALLOWED_TIME = 1.2, 1.1
DENSE_READ, PACKED_READ, CHECKED_READ = "dense, then read", "packed, then read", "packed and checked, then read"
UNCHECKED = ARBConfig(calibration=None, run=RunOptions(verify=False))
SALIENT = 300  # no multiple of 128, so that the padding of a plane has to be looked at


def llama(hidden: int, intermediate: int, blocks: int) -> LlamaForCausalLM:
    """Return a dense Llama on ``meta``, its weights in bfloat16."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=VOCABULARY,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    return model.eval()


def _filled(module: nn.Module) -> None:
    """Replace the ``meta`` tensors of a module by small random ones."""
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        if parameter.device.type == "meta":
            tensor = torch.randn(parameter.shape, dtype=parameter.dtype).mul_(0.02)
            setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def _random_format(out_features: int, in_features: int) -> BinaryFormat:
    """Return a packed weight with everything that ARB-LLM_RC stores, filled with random bits."""
    spec = BinarySpec(
        out_features, in_features, groups=2, salient=min(SALIENT, in_features // 4), salient_groups=1, col_scales=True
    )
    columns = {"sign": in_features, "group": in_features, "sign2": spec.salient}
    state: dict[str, Tensor] = {}
    for name, (shape, dtype) in BinaryFormat.shapes(spec).items():
        if name in columns:
            bits = torch.randint(0, 2, (*shape[:-1], columns[name]), dtype=torch.bool)
            state[name] = pack_plane(bits.view(-1, columns[name])).view(shape)
        elif name == "salient":
            state[name] = torch.randperm(in_features)[: spec.salient].sort().values.to(dtype)
        else:
            state[name] = torch.rand(shape).mul_(0.02).to(dtype)
    packed = BinaryFormat.from_state(state, spec)
    packed.validate("random")
    return packed


def save_packed(folder: Path, hidden: int, intermediate: int, blocks: int) -> dict[str, int]:
    """Save a packed model of random bits.

    Returns:
        Bytes of the packed tensors, of the rest, and the number of tensors.
    """
    model = llama(hidden, intermediate, blocks)
    table = {}
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and name != "lm_head":
            packed = _random_format(linear.out_features, linear.in_features)
            model.set_submodule(name, PackedLinear(packed, None, torch.bfloat16))
            table[name] = {"method": "arb", "format": packed.name, "spec": packed.spec.to_json(), "error": None}
    _filled(model)
    config = ARBConfig(calibration=None, modules=table, left_dense={"lm_head": "output head"})
    model.hf_quantizer = LowBitHfQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    save_model(model, folder)
    state = model.state_dict()
    packed_bytes = sum(t.nbytes for name, t in state.items() if ".weight_" in name)
    return {
        "packed": packed_bytes,
        "rest": sum(t.nbytes for t in state.values()) - packed_bytes,
        "tensors": len(state),
    }


def save_dense_like(folder: Path, size: int, tensors: int) -> dict[str, int]:
    """Save a dense model of about as many bytes in as many tensors as given."""
    blocks = max(1, round((tensors - 3) / 9))
    hidden = max(64, round((size / 2 / blocks / 12.25) ** 0.5 / 64) * 64)  # 4 h² + 3 · 2.75 h² weights in a block
    model = llama(hidden, round(2.75 * hidden), blocks)
    _filled(model)
    model.save_pretrained(folder)
    state = model.state_dict()
    return {"packed": 0, "rest": sum(t.nbytes for t in state.values()), "tensors": len(state)}


def read_all(model: nn.Module) -> int:
    """Read every byte of a model's parameters once."""
    return sum(int(_words(parameter.detach()).sum()) for parameter in model.parameters())


def _words(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().view(-1)
    size = flat.numel() * flat.element_size()
    return flat.view(torch.uint8)[: size - size % 8].view(torch.int64) if size >= 8 else flat.view(torch.uint8)


def _read_raw(folder: Path) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():
                _words(handle.get_tensor(key)).sum()


def measure_memory(folder: str, warm: str, verify: bool) -> dict[str, Any]:
    """Return the memory that loading takes, in this process; a tiny model has been loaded before."""
    config = ARBConfig(calibration=None, run=RunOptions(verify=verify))
    AutoModelForCausalLM.from_pretrained(warm, quantization_config=config)
    with watched() as memory:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert model is not None
    return dict(memory)


def measure_time(packed: str, dense: str, repeats: int) -> dict[str, Any]:
    """Time several ways to load, in turns.

    Returns:
        For each way the medians of wall and CPU seconds, and of their ratios to the dense model loaded and read.
    """

    def checked() -> Any:
        return AutoModelForCausalLM.from_pretrained(packed)

    def unchecked() -> Any:
        return AutoModelForCausalLM.from_pretrained(packed, quantization_config=UNCHECKED)

    def plain() -> Any:
        return AutoModelForCausalLM.from_pretrained(dense)

    ways: dict[str, Callable[[], Any]] = {
        DENSE_READ: lambda: read_all(plain()),
        "dense": plain,
        PACKED_READ: lambda: read_all(unchecked()),
        "packed": unchecked,
        CHECKED_READ: lambda: read_all(checked()),
        "safetensors alone, then read": lambda: _read_raw(Path(packed)),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(repeats + 1):  # the first round warms up and does not count
        for name, way in ways.items():
            gc.collect()
            began = time.perf_counter(), time.process_time()
            way()
            if turn:
                times[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    found = {}
    for name, rows in times.items():
        ratios = [
            [a / b for a, b in zip(row, floor, strict=True)]
            for row, floor in zip(rows, times[DENSE_READ], strict=True)
        ]
        found[name] = {
            "wall": round(statistics.median(row[0] for row in rows), 4),
            "cpu": round(statistics.median(row[1] for row in rows), 4),
            "wall ratio": round(statistics.median(ratio[0] for ratio in ratios), 3),
            "cpu ratio": round(statistics.median(ratio[1] for ratio in ratios), 3),
        }
    return found


def drill(small: bool = False) -> dict[str, Any]:
    """Measure, and compare with the requirements; small runs are not judged."""
    hidden, intermediate, blocks, repeats = (256, 512, 1, 1) if small else (4096, 11008, 8, 9)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        warm, packed, dense = (str(folder / part) for part in ("tiny", "packed", "dense"))
        save_packed(Path(warm), 64, 128, 1)
        sizes = save_packed(Path(packed), hidden, intermediate, blocks)
        size = sizes["packed"] + sizes["rest"]
        dense_sizes = save_dense_like(Path(dense), size, sizes["tensors"])
        memory = {
            verify: called("tests.drills.load:measure_memory", not small, folder=packed, warm=warm, verify=verify)
            for verify in ([False] if small else [False, True])
        }
        seconds = called("tests.drills.load:measure_time", True, packed=packed, dense=dense, repeats=repeats)
    checks = []
    for verify, found in memory.items():
        ratio = found["total"] * MB / size
        checks.append(
            check(
                f"loading, verify={verify}: highest memory at most {ALLOWED_MEMORY} × the bytes of the model",
                f"{ratio:.2f} × ({found['total']:.0f} of {size / MB:.0f} MB; anonymous {found['anonymous']:.0f})",
                None if small else ratio <= ALLOWED_MEMORY,
            )
        )
    way = seconds[PACKED_READ]
    for kind in ("wall", "cpu"):
        checks.append(
            check(
                f"loading, verify=False, and reading every byte: at most {ALLOWED_TIME} × the {kind} time of a dense "
                "model with as many bytes in as many tensors",
                f"{way[f'{kind} ratio']:.2f} × ({way[kind]:.2f} s; loading alone {seconds['packed'][kind]:.2f} s, "
                f"of the dense model {seconds['dense'][kind]:.2f} s)",
                None if small else way[f"{kind} ratio"] <= ALLOWED_TIME,
            )
        )
    cost = seconds[CHECKED_READ]["wall"] - way["wall"]
    checks.append(check("cost of the checksums (wall time)", f"{cost:.2f} s, {size / 1e9 / cost:.1f} GB/s", None))
    figures = {"sizes": sizes, "dense sizes": dense_sizes, "times": seconds}
    return {"checks": checks, **figures, "memory": {f"verify={verify}": row for verify, row in memory.items()}}
