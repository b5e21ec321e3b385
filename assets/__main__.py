"""``python -m assets [NAME ...]``: fetch what is named, or everything, and print where it lies and how big it is."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import assets
from assets import dat, super_resolution, video

RESULTS: dict[str, Callable[[], list[Path]]] = {
    "smollm2": lambda: [assets.smollm2()],
    "gemma3": lambda: [assets.gemma3()],
    "wikipedia": lambda: [assets.wikipedia("calibration"), assets.wikipedia("heldout")],
    "news": lambda: [assets.news()],
    "photos": lambda: [super_resolution.photos("train"), super_resolution.photos("heldout")],
    "swin2sr": lambda: [super_resolution.swin2sr()],
    "dat": lambda: [dat.folder()],
    "video": lambda: [video.path()],
}


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m assets", description=__doc__)
    parser.add_argument("name", nargs="*", default=["all"], help=f"{', '.join(RESULTS)} or all")
    names = parser.parse_args().name
    unknown = [name for name in names if name not in RESULTS and name != "all"]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(RESULTS)}, all")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("assets").setLevel(logging.INFO)
    for name in RESULTS if "all" in names else names:
        for path in RESULTS[name]():
            print(f"{name:10} {size(path) / 1e6:8.1f} MB  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
