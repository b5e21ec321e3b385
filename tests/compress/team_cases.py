"""What several processes are started on: every method that compresses in a run, on a tiny model each.

    torchrun --nproc-per-node 2 -m tests.compress.team_cases FOLDER [--die-after N] CASE ...

A folder holds the dense models under their names; each process compresses the cases in order, the leading one saves.
With ``--die-after`` the last process kills itself when so many groups of layers are recorded.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from transformers import AutoModelForCausalLM, Swin2SRForImageSuperResolution

from hf_lowbit import (
    AdaSVDConfig,
    DVDQuantConfig,
    LowBitRecipe,
    ReCalKVConfig,
    RunOptions,
)
from hf_lowbit.compress.engine import Run
from hf_lowbit.compress.journal import Journal
from hf_lowbit.compress.team import Team, join, leave
from hf_lowbit.errors import TeamError
from hf_lowbit.hf.save import save_model
from tests.compress.test_planning import sparse
from tests.hf.test_transformers import quick
from tests.methods import test_condiquant
from tests.tiny import closed_router, tiny_model, tokens
from tests.video_pipelines import wan

DATA = {"calibration": tokens(8), "samples": 8}
BATCH = {"batch_size": 1, "progress": False}
ONLY = "model.layers.0.mlp.down_proj"


def recipe(**changes: Any) -> LowBitRecipe:
    """Weights of three methods, and latents in the cache of the same model."""
    data = {**DATA, **changes}
    rules = {
        "*.self_attn.[kv]_proj": ReCalKVConfig(rank_multiple=4, **data),
        "*.mlp.down_proj": AdaSVDConfig(ratio=0.5, **data),
        "*.mlp.gate_proj": sparse(**data),
        "*.mlp.up_proj": DVDQuantConfig(layers="all"),
        "*": quick(**data),
    }
    return LowBitRecipe(rules)


def budget(**data: Any) -> LowBitRecipe:
    """Candidates of two methods for every layer."""
    integers = [DVDQuantConfig(preset="weights", w_bits=bits, **data) for bits in (2, 3, 4)]
    return LowBitRecipe({"*": [*integers, quick(**data)]}, target_bits_per_weight=3.6)


# case -> (dense model, config); names of models are those of `save_dense`
CASES: dict[str, tuple[str, Any]] = {
    "llama-free": ("llama", lambda: quick(calibration=None)),
    "llama-one-layer": ("llama", lambda: LowBitRecipe({ONLY: quick(calibration=None)})),
    "llama-integer": ("llama", lambda: DVDQuantConfig(layers="all")),
    "mixtral-free": ("mixtral", lambda: quick(calibration=None)),
    "wan-integer": ("wan", lambda: DVDQuantConfig()),
    "llama-data": ("llama", lambda: quick(**DATA)),
    "mixtral-data": ("mixtral", lambda: quick(**DATA)),
    "closed-data": ("closed", lambda: quick(**DATA)),
    "llama-broken": ("llama", lambda: quick(calibration=None)),
    "llama-few": ("llama", lambda: quick(calibration=[[5, 6, 7]], samples=1)),
    "llama-sparse": ("llama", lambda: sparse(n=4)),
    "llama-ratio": ("llama", lambda: AdaSVDConfig(ratio=0.5, **DATA)),
    "llama-stacked": ("llama", lambda: AdaSVDConfig(ratio=0.5, buckets=4, sequential=False, **DATA)),
    "llama-latent": ("llama", lambda: ReCalKVConfig(rank_multiple=4, ocmf="cross", **DATA)),
    "llama-mixed": ("llama", recipe),
    "llama-budget": ("llama", lambda: budget(**DATA)),
    "llama-budget-free": ("llama", lambda: budget(calibration=None)),
    "images": ("swin", lambda: test_condiquant.quick(weight_bits=2, act_bits=2)),
    "images-learned": ("swin", lambda: test_condiquant.quick(sequential=True, refine="dqc", refine_steps=4)),
}
FAILING = ("llama-few", "llama-broken")
EXACT = ("llama-free", "llama-one-layer", "llama-integer", "llama-budget-free", "mixtral-free", "wan-integer")
KINDS = {"swin": Swin2SRForImageSuperResolution, "wan": WanTransformer3DModel}


def save_dense(folder: Path, names: set[str]) -> None:
    """Save the dense models."""
    made = {"swin": test_condiquant.tiny_model, "wan": lambda: wan()[0].transformer, "closed": closed_router}
    for name in sorted(names):
        (made[name]() if name in made else tiny_model(name)).save_pretrained(folder / name)


def compressed(folder: Path, case: str, **options: Any) -> Any:
    """Compress the dense model of a case, and return it."""
    name, make = CASES[case]
    config = make()
    config.run = RunOptions(**{**BATCH, **options})
    if name == "wan":
        return KINDS[name].from_pretrained(folder / name, quantization_config=config)
    return KINDS.get(name, AutoModelForCausalLM).from_pretrained(folder / name, quantization_config=config)


def die_after(groups: int) -> None:
    """Let this process be killed when so many groups of layers are recorded."""
    append, left = Journal.append, iter(range(groups - 1, -1, -1))

    def last(self: Journal, *arguments: Any, **options: Any) -> None:
        append(self, *arguments, **options)
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.append = last  # type: ignore[method-assign]


@contextlib.contextmanager
def broken(rank: int) -> Iterator[None]:
    """Let packing fail within a ``with`` statement, but not in the leading process."""
    pack = Run._pack

    def fail(self: Run, name: str, stats: Any) -> Any:
        if rank:
            raise ValueError(f"{name}: meant to fail")
        return pack(self, name, stats)

    Run._pack = fail  # type: ignore[method-assign]
    try:
        yield
    finally:
        Run._pack = pack  # type: ignore[method-assign]


def main(folder: Path, cases: list[str]) -> None:
    """Compress in company."""
    torch.set_num_threads(1)
    join()
    team = Team()
    if cases[0] == "--die-after":
        if team.rank == team.size - 1:
            die_after(int(cases[1]))
        cases = cases[2:]
    for case in cases:
        journal, report = folder / f"journal-{case}", folder / f"{case}.jsonl"
        if case in FAILING:
            with pytest.raises((ValueError, TeamError)) as raised, broken(team.rank if case == "llama-broken" else 0):
                compressed(folder, case)
            sys.stderr.write(f"{case}, process {team.rank}: {type(raised.value).__name__}: {raised.value}\n")
            continue
        model = compressed(folder, case, journal=journal, report=report, resume=True)
        if team.leads:
            save_model(model, folder / case)
        team.wait()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
