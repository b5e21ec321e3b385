"""Times launch settings on the GPU at hand and writes those that won, as :mod:`hf_lowbit.kernels.tuning` reads them.

    python -m hf_lowbit.kernels.triton.tune settings.json --shapes 4096x4096 11008x4096

Put the file into ``hf_lowbit/kernels/tuning`` as ``binary.<device>.json``; the command logs the name.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

from hf_lowbit.kernels.planes import plane_bytes
from hf_lowbit.kernels.triton import binary
from hf_lowbit.kernels.tuning import Settings, choose, split_count

logger = logging.getLogger(__name__)

BATCHES = (1, 16, 64, 256, 2048)
# 16 rows a warp: with more, Triton moves unpacked weights through shared memory.
_BLOCKS_N = ((32, 2), (64, 4), (128, 8))


def candidates(batch: int) -> Iterator[Settings]:
    """Yield the settings worth a try for so many tokens."""
    most = min(256, max(16, triton.next_power_of_2(batch)))
    programs = (1, 2, 4, 8) if batch <= 64 else (1, 2)
    for (block_n, warps), block_m in itertools.product(_BLOCKS_N, (16, 32, 64, 128, 256)):
        if most // 4 <= block_m <= most:
            for stages, per_core in itertools.product((2, 3, 4), programs):
                yield Settings(block_n, block_m, warps, stages, per_core)


def tune(
    device: str | torch.device,
    shapes: Sequence[tuple[int, int]],
    path: str | Path,
    batches: Sequence[int] = BATCHES,
    dtype: torch.dtype = torch.bfloat16,
    clock: Callable[[Callable[[], Any]], float] | None = None,
) -> list[dict[str, int]]:
    """Measure, and write the fastest settings of each problem.

    Args:
        device: a CUDA or ROCm device.
        shapes: (out_features, in_features) of the layers to tune for.
        path: the JSON file to write; its folder must exist.
        batches: numbers of tokens, each standing for all up to it.
        dtype: compute type.
        clock: returns the time of a call in any unit; default the median in milliseconds with a cold cache.

    Returns:
        The rows written, smallest problems first.

    Raises:
        RuntimeError: there is no such device.
    """
    device = torch.device(device)
    reason = binary.unsupported_device(device)
    if reason is not None:
        raise RuntimeError(f"tuning measures on a real device: {reason}")
    clock = clock or _median
    rows = []
    for batch, (out_features, in_features) in itertools.product(sorted(batches), sorted(shapes)):
        settings = _fastest(device, batch, out_features, in_features, dtype, clock)
        limits = {"bits": 8 * dtype.itemsize, "batch": batch, "out_features": out_features, "in_features": in_features}
        rows.append({**limits, **dataclasses.asdict(settings)})
    lines = ",\n ".join(json.dumps(row) for row in rows)
    Path(path).write_text(f"[\n {lines}\n]\n", encoding="utf-8")
    return rows


def _fastest(
    device: torch.device, batch: int, out_features: int, in_features: int, dtype: torch.dtype, clock: Callable
) -> Settings:
    weight = random_weight(device, out_features, in_features, dtype)
    x = torch.randn((batch, in_features), device=device).to(dtype)
    names, cores = binary.device_names(device)
    shipped = choose("binary", names, 8 * dtype.itemsize, batch, out_features, in_features)
    times: dict[Settings, float] = {}
    seen: dict[tuple[Any, ...], Settings] = {}
    for settings in (shipped, *candidates(batch)):
        tiles = -(-out_features // settings.block_n) * -(-batch // settings.block_m)
        splits = split_count(tiles, weight.column_groups, cores, settings.programs_per_core)
        launch = (settings.block_n, settings.block_m, settings.num_warps, settings.num_stages, splits)
        if launch in seen:
            continue
        seen[launch] = settings
        try:
            times[settings] = clock(lambda s=settings: binary.run(x, weight, None, s))  # type: ignore[misc]
        except (OutOfResources, PTXASError) as error:
            logger.info("%s cannot be launched: %s", settings, error)
    best = min(times, key=times.__getitem__)
    ratio = times[shipped] / times[best] if shipped in times else float("nan")
    logger.info("%d × %d, batch %d: %s, %.2f × shipped", out_features, in_features, batch, best, ratio)
    return best


def random_weight(device: torch.device, out_features: int, in_features: int, dtype: torch.dtype) -> binary.Weight:
    """Return a weight of ARB-LLM's default kind: two groups, column scales, 6 % salient columns; random bits."""

    def plane(*shape: int) -> torch.Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, device=device)

    def scale(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=device).half()

    columns, blocks = plane_bytes(in_features), -(-in_features // 128)
    salient = torch.arange(0, in_features, 16, dtype=torch.int32, device=device)
    count = len(salient)
    return binary.weight_of(
        dtype,
        plane(out_features, columns),
        scale(6, blocks, out_features),
        plane(1, out_features, columns),
        None,
        scale(2, in_features),
        salient,
        plane(out_features, plane_bytes(count)),
        scale(2, count),
        None,
        in_features,
        128,
        0,
        0,
    )


def _median(call: Callable[[], Any]) -> float:
    return float(triton.testing.do_bench(call, return_mode="median"))


def main() -> None:
    """Parse arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="JSON file to write")
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    shapes = [tuple(int(size) for size in shape.split("x")) for shape in arguments.shapes]
    if any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        parser.error(f"--shapes wants ROWSxCOLUMNS, got {' '.join(arguments.shapes)}")
    tune(arguments.device, shapes, arguments.path, arguments.batches)  # type: ignore[arg-type]
    logger.info("to have it used: %s", f"binary.{binary.device_names(torch.device(arguments.device))[0][0]}.json")


if __name__ == "__main__":
    main()
