"""Launch settings of the GPU kernels: data, not code.

``<family>.json`` holds the default settings of a kernel family, ``<family>.<device>.json`` those for one kind of
device: its name as :func:`slug` writes it, its architecture (``sm_90``, ``gfx942``), ``cuda`` or ``hip``. A file is a
list of rows; the first row that fits a problem wins, those of the most specific file first.

The files shipped here were chosen by what the compiled kernels contain (``python -m benchmarks.kernels.compiled``: no
spills, no work done twice, shared memory), not by a clock. ``hf_lowbit.kernels.triton.tune`` measures on a real device
and writes such a file; put it in this folder to have it used. Nothing here imports Triton.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one launch is cut up.

    Attributes:
        block_n: rows of the weight per program, a power of two, at least 16.
        block_m: tokens per program, a power of two.
        num_warps: warps per program.
        num_stages: stages of the software pipeline.
        programs_per_core: K is cut into pieces until each multiprocessor has about this many programs.
    """

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int
    programs_per_core: int = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """Settings and the problems they are for; None fits all.

    Attributes:
        settings: how to launch.
        bits: width of the compute type.
        batch: most tokens.
        out_features: most rows of the weight.
        in_features: most columns of the weight.
    """

    settings: Settings
    bits: int | None = None
    batch: int | None = None
    out_features: int | None = None
    in_features: int | None = None

    def fits(self, bits: int, batch: int, out_features: int, in_features: int) -> bool:
        """Whether the row is for such a problem."""
        limits = ((self.batch, batch), (self.out_features, out_features), (self.in_features, in_features))
        return self.bits in (None, bits) and all(limit is None or value <= limit for limit, value in limits)


def slug(name: str) -> str:
    """Return the name of a device as it stands in file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def parse(rows: list[dict[str, Any]], where: str) -> tuple[Row, ...]:
    """Return the rows of a settings file.

    Raises:
        ValueError: a row has unknown or missing keys, or a value that is not a positive integer.
    """
    limits = {field.name for field in dataclasses.fields(Row)} - {"settings"}
    sizes = {field.name for field in dataclasses.fields(Settings)}
    found = []
    for number, row in enumerate(rows):
        unknown, missing = sorted(set(row) - limits - sizes), sorted(sizes - set(row))
        wrong = sorted(key for key, value in row.items() if type(value) is not int or value < 1)
        if unknown or missing or wrong:
            raise ValueError(f"{where}, row {number}: unknown {unknown}, missing {missing}, not positive {wrong}")
        settings = Settings(**{key: row[key] for key in sizes})
        found.append(Row(settings, **{key: row[key] for key in limits & set(row)}))
    return tuple(found)


@functools.cache
def table(family: str, *devices: str) -> tuple[Row, ...]:
    """Return the rows for a kernel family, those of ``devices`` (slugs, most specific first) before the default."""
    found: tuple[Row, ...] = ()
    for name in (*(f"{family}.{device}" for device in devices), family):
        path = FOLDER / f"{name}.json"
        if path.is_file() or name == family:
            found += parse(json.loads(path.read_text("utf-8")), path.name)
    return found


@functools.lru_cache(4096)
def choose(
    family: str, devices: tuple[str, ...], bits: int, batch: int, out_features: int, in_features: int
) -> Settings:
    """Return the settings of the first row that fits; the last default row fits everything."""
    for row in table(family, *devices):
        if row.fits(bits, batch, out_features, in_features):
            return row.settings
    raise LookupError(f"{family}.json has no row that fits every problem")


def split_count(tiles: int, groups: int, cores: int, programs_per_core: int) -> int:
    """Return into how many pieces K is cut.

    Args:
        tiles: programs without cutting.
        groups: column groups, which are not cut.
        cores: multiprocessors of the device.
        programs_per_core: programs wanted on each.

    Returns:
        From 1 to ``groups``; no piece is empty.
    """
    wanted = max(1, min(groups, cores * programs_per_core // tiles))
    per_split = -(-groups // wanted)
    return -(-groups // per_split)
