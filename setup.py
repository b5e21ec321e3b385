"""Builds the CPU kernels; all else is in pyproject.toml. Without a compiler the package installs without them."""

import os
import platform
import sys

from setuptools import Extension, setup

FOLDER = "hf_lowbit/kernels/cpu/csrc"
# library -> its sources and headers
LIBRARIES = {
    "_binary": (
        ("api", "tile_avx512", "expand_avx512bf16", "tile_avx2", "tile_portable", "wide_amx"),
        ("avx512.h", "binary.h", "expand.h", "half.h", "tile.h"),
    ),
    "_integer": (
        ("integer_api", "integer_avx512", "integer_avx2", "integer_portable", "integer_amx"),
        ("avx512.h", "binary.h", "half.h", "integer.h", "integer_rows.h", "integer_transform.h", "integer_x86.h"),
    ),
    "_popcount": (
        ("popcount", "popcount_avx512", "popcount_avx2", "popcount_portable"),
        ("half.h", "popcount.h", "popcount_finish.h", "popcount_rows.h"),
    ),
    "_latent": (
        ("latent", "latent_tiles", "latent_dots"),
        (
            "avx512.h",
            "half.h",
            "latent.h",
            "latent_core.h",
            "latent_plan.h",
            "latent_rows.h",
            "latent_scores.h",
            "latent_sums.h",
        ),
    ),
    "_low_rank": (("low_rank", "low_rank_avx2", "low_rank_avx512"), ("half.h", "low_rank.h", "low_rank_tile.h")),
}

flags = ["-O3", "-g0", "-std=c++17", "-fno-strict-aliasing", "-fvisibility=default"]
# the OpenMP runtime that torch brings is shared, so that torch.set_num_threads counts; clang on macOS has none
openmp = ["-fopenmp"] if sys.platform == "linux" else []

setup(
    options={"build_ext": {"parallel": os.cpu_count()}},  # one library beside the other
    ext_modules=[
        Extension(
            f"hf_lowbit.kernels.cpu.{library}",
            sources=[f"{FOLDER}/{name}.cpp" for name in names],
            depends=[f"{FOLDER}/{name}" for name in headers],
            extra_compile_args=[*flags, *openmp],
            extra_link_args=openmp,
            optional=True,
        )
        for library, (names, headers) in LIBRARIES.items()
    ]
    if platform.system() != "Windows"
    else [],
)
