"""Other libraries for ``benchmarks.equal_bytes``: each quantizes the linear layers of the decoder blocks, in place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import assets
from hf_lowbit.compress.headers import read_headers

Make = Callable[[Any, Tensor], Any]


def _targets(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and not n.endswith("lm_head")}


def hqq(bits: int, group: int) -> Make:
    """HQQ: half-quadratic search of grids, without data."""

    def make(model: Any, calibration: Tensor) -> Any:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
        for name, layer in _targets(model).items():
            packed = HQQLinear(layer, config, compute_dtype=torch.bfloat16, device="cpu", initialize=True)
            model.set_submodule(name, packed)
        return model

    return make


def quanto(kind: str) -> Make:
    """Quanto: rounding to a searched range, groups of 128, without data."""

    def make(model: Any, calibration: Tensor) -> Any:
        from optimum import quanto as library

        library.quantize(model, weights=getattr(library, kind), exclude="*lm_head")
        library.freeze(model)
        return model

    return make


def torchao(bits: int, group: int) -> Make:
    """Torchao: rounding to integers of any width, kept one to a byte by its eager form on CPUs."""

    def make(model: Any, calibration: Tensor) -> Any:
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

        config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group))
        quantize_(model, config, filter_fn=lambda module, name: name in names)
        return model

    names: set[str] = set()

    def named(model: Any, calibration: Tensor) -> Any:
        names.update(_targets(model))
        return make(model, calibration)

    return named


def bitsandbytes(kind: str, double: bool) -> Make:
    """Bitsandbytes: four bits on a fixed grid of quantiles, blocks of 64, without data."""

    def make(model: Any, calibration: Tensor) -> Any:
        from bitsandbytes.nn import Linear4bit

        for name, layer in _targets(model).items():
            packed = Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=double,
                quant_type=kind,
            )
            packed.load_state_dict({"weight": layer.weight.data})
            model.set_submodule(name, packed.to("cpu"))
        return model

    return make


def gptq(bits: int, group: int) -> Make:
    """GPTQ as LLM Compressor has it; it leaves rounded weights, whose packed bytes are those of its storage format."""

    def make(model: Any, calibration: Tensor) -> Any:
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier

        count, length = calibration.shape
        data = Dataset.from_dict({"input_ids": calibration.tolist(), "attention_mask": [[1] * length] * count})
        weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group}
        groups = {"all": {"targets": ["Linear"], "weights": weights}}
        oneshot(
            model=model,
            dataset=data,
            processor=AutoTokenizer.from_pretrained(assets.smollm2()),
            recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
            num_calibration_samples=count,
            max_seq_length=length,
        )
        return model

    return make


# row -> package, how it is made
ROWS: dict[str, tuple[str, Make]] = {
    "hqq-2-64": ("hqq", hqq(2, 64)),
    "hqq-2-16": ("hqq", hqq(2, 16)),
    "hqq-3-64": ("hqq", hqq(3, 64)),
    "hqq-4-64": ("hqq", hqq(4, 64)),
    "quanto-2": ("optimum-quanto", quanto("qint2")),
    "quanto-4": ("optimum-quanto", quanto("qint4")),
    "bitsandbytes-nf4": ("bitsandbytes", bitsandbytes("nf4", True)),
    "gptq-2-64": ("llmcompressor", gptq(2, 64)),
    "gptq-3-64": ("llmcompressor", gptq(3, 64)),
    "torchao-4-32": ("torchao", torchao(4, 32)),
    "torchao-3-64": ("torchao", torchao(3, 64)),
    "torchao-2-64": ("torchao", torchao(2, 64)),
}


def stored_bytes(model: Any, names: Collection[str]) -> int:
    """Return the bytes that a library stores for linear layers: codes, scales, zero points, tables.

    Those of the tensors that the layers hold; of LLM Compressor, which holds rounded weights, those of the file that
    it writes.
    """
    if not hasattr(model.get_submodule(next(iter(names))), "quantization_scheme"):
        return sum(_held_bytes(model.get_submodule(name)) for name in names)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_compressed=True)
        headers = [one for file in Path(folder).glob("*.safetensors") for one in read_headers(file).items()]
    return sum(header.nbytes for key, header in headers if key.rpartition(".")[0] in names)


def _held_bytes(module: Any) -> int:
    seen: dict[int, int] = {}

    def add(value: Any, depth: int = 0) -> None:
        if depth > 6:
            return
        if isinstance(value, Tensor):
            inner = getattr(value, "__tensor_flatten__", None)
            if inner is not None:
                for name in inner()[0]:
                    add(getattr(value, name), depth + 1)
            else:
                seen[value.data_ptr()] = max(seen.get(value.data_ptr(), 0), value.numel() * value.element_size())
            state = getattr(value, "quant_state", None)
            if state is not None:
                add(vars(state), depth + 1)
        elif isinstance(value, dict):
            for part in value.values():
                add(part, depth + 1)
        elif type(value).__name__ == "QuantState":
            add(vars(value), depth + 1)

    for tensor in (*module.parameters(), *module.buffers()):
        add(tensor)
    for name in ("W_q", "meta", "quant_state"):
        add(getattr(module, name, None))
    return sum(seen.values())
