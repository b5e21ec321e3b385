"""Binary convolutions on scikit-learn's digits: train, compare, pack, save, load. ``--tiny`` takes under a minute.

A stem and six bottleneck blocks learn 1200 images of 8 × 8 pixels, once as a float network, once with plain binary
convolutions, once with BiDRN's residuals. The last is packed, and the packed network gives the same answers.

    python -m examples.binary_convs [--tiny] [--seeds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hf_lowbit import pack_convs
from hf_lowbit.methods.bidrn import PLAIN, BiDRB, UnitOptions
from hf_lowbit.methods.bidrn.network import RealBlock

# (channels in, channels out, stride) of the blocks
BLOCKS = ((32, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1))
Data = tuple[Tensor, Tensor, Tensor, Tensor]
Block = Callable[[int, int, int], nn.Module]


class PlainBlock(nn.Sequential):
    """The plain binary network: sign, scale, normalization, hard tanh; no residual of any kind."""

    def __init__(self, ins: int, outs: int, stride: int, ste: str = "poly") -> None:
        options = dataclasses.replace(PLAIN, ste=ste)
        units = BiDRB(ins, outs, stride, block_residual="none", options=options).units
        super().__init__(*(layer for unit in units for layer in (unit, nn.Hardtanh())))


def _block(residual: str, **options: Any) -> Block:
    return lambda ins, outs, stride: BiDRB(ins, outs, stride, block_residual=residual, options=UnitOptions(**options))


VARIANTS: dict[str, Block] = {
    "float": lambda ins, outs, stride: RealBlock(ins, outs, stride, "bottleneck"),
    "bnn": PlainBlock,
    "bnn-clip": functools.partial(PlainBlock, ste="clip"),
    "lcr": _block("none"),
    "br": _block("fp", lcr=False),
    "bidrb": _block("fp"),
    "bidrb-named": lambda ins, outs, stride: BiDRB(ins, outs, stride, named=True),
}
TITLES = {
    "float": "float network",
    "bnn": "plain binary network, no residual",
    "bnn-clip": "the same, gradient of a clamp in place of the quadratic",
    "lcr": "residual around each convolution only (LCR)",
    "br": "residual around blocks only (BR)",
    "bidrb": "both residuals (BiDRB)",
    "bidrb-named": "both, named modules where shapes change",
}


def digits() -> Data:
    """Return training images and labels (1200), test images and labels (597)."""
    found = load_digits()
    order = torch.from_numpy(numpy.random.RandomState(0).permutation(len(found.target)))
    images = (torch.from_numpy(found.images).float() / 8 - 1).unsqueeze(1)[order]
    labels = torch.from_numpy(found.target).long()[order]
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


def network(block: Block) -> nn.Module:
    """Return a real stem, six blocks, and a real classifier."""
    stem = nn.Sequential(nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32))
    blocks = nn.Sequential(*(block(*shape) for shape in BLOCKS))
    return nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers."""
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).double().mean())


def train(block: Block, data: Data, seed: int, epochs: int) -> tuple[nn.Module, float]:
    """Return a trained network and its accuracy on the test images."""
    images, labels, *test = data
    torch.manual_seed(seed)
    model = network(block)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * 10)
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(1200).split(120):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model, accuracy(model, *test)


def show_packed(model: nn.Module, data: Data) -> None:
    """Pack a trained network, write and read it, and compare."""
    images, labels = data[2:]
    with torch.no_grad():
        before = model.eval()(images)
    dense = sum(p.numel() for p in model.parameters()) * 4
    sizes = pack_convs(model)
    with torch.no_grad():
        after = model(images)
    whole = sum(tensor.nbytes for tensor in model.state_dict().values())
    print(f"packed {len(sizes)} convolutions into {sum(sizes.values()):,} bytes")
    print(f"whole network: {whole:,} bytes, {dense:,} with float32 weights")
    print(f"largest difference of an output: {float((after - before).abs().max()):.1e}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "digits.safetensors"
        save_file(model.state_dict(), file)
        model.load_state_dict(load_file(file))
    print(f"accuracy of the packed network, from its file: {100 * accuracy(model, images, labels):.1f} %")


def main() -> None:
    """Train, compare, pack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="4 epochs, one seed, two networks")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--json", metavar="FILE", help="write the accuracies to a file")
    given = parser.parse_args()
    if given.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {given.seeds}")
    if given.json and not Path(given.json).absolute().parent.is_dir():
        parser.error(f"--json {given.json}: its folder does not exist")
    data, epochs, seeds = digits(), 4 if given.tiny else 12, 1 if given.tiny else given.seeds
    names = ("bnn", "bidrb") if given.tiny else tuple(VARIANTS)
    found: dict[str, list[float]] = {name: [] for name in names}
    model: nn.Module | None = None
    for name in names:
        for seed in range(seeds):
            began = time.process_time()
            trained, score = train(VARIANTS[name], data, seed, epochs)
            found[name].append(score)
            model = trained if name == "bidrb" and seed == 0 else model
            seconds = time.process_time() - began
            print(f"{TITLES[name]}, seed {seed}: {100 * score:.1f} % ({seconds:.0f} s of processor time)", flush=True)
    if model is not None:
        show_packed(model, data)
    if given.json:
        content = {"epochs": epochs, "steps": 10 * epochs, "accuracy": found}
        Path(given.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
