"""Decisions for a stack of blocks as a whole, made before its first block is compressed (see ``Method.plan``).

What a method wants to know of the dense blocks is measured in one pass over the calibration data that reads each block
when its turn comes and lets go of it, like the run itself. What was decided goes into the journal, so that a run that
was killed goes on with the same numbers, and into the saved config.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_lowbit import registry
from hf_lowbit.calibration import capture
from hf_lowbit.compress.projections import projection_of
from hf_lowbit.config import LowBitConfig
from hf_lowbit.errors import CheckpointError
from hf_lowbit.layers import features
from hf_lowbit.recipe import LowBitRecipe, rules_of

if TYPE_CHECKING:
    from hf_lowbit.compress.engine import Run
    from hf_lowbit.compress.measures import StackMeasures

Plan = dict[str, dict[str, Any]]


def plan_stack(run: Run, stack: Mapping[str, nn.Module], measures: StackMeasures) -> None:
    """Let the methods of a run decide on the blocks of a stack, and put what they decide into the run's configs.

    Args:
        run: whose ``config`` and ``targets`` change.
        stack: blocks by name, none of them compressed in this run; a journal may hold some.
        measures: looks at the dense blocks; their similarity is measured once if any rule asks.

    Raises:
        ValueError: a method refuses its options.
        CheckpointError: the journal's plan does not fit the run.
    """
    first, similarity = next(iter(stack)), functools.cache(measures.similarity)
    recorded = None if run.journal is None else run.journal.plans.get(first)
    plan: Plan = recorded or {}
    for pattern, rule in rules_of(run.config):
        method = registry.get(rule.method)
        units = block_units(run, stack, rule)
        if not units or (method.plan is None and method.allocate is None):
            continue
        projections = projection_units(run, stack, rule) if method.allocate is not None else []
        if recorded is not None:
            known = {*stack, *(projection.name for projection in projections)}
            if pattern not in recorded or not set(recorded[pattern]) <= known:
                raise CheckpointError(f"the journal's plan of {first} does not fit this run")
        elif method.allocate is not None:
            plan[pattern] = method.allocate(projections, rule, measures)
        elif method.plan is not None:
            plan[pattern] = method.plan(units, rule, similarity)
        if plan[pattern]:
            _adopt(run, pattern, plan[pattern], recorded is not None)
    if recorded is None and plan and run.journal is not None and run.team.leads:
        run.journal.append_plan(first, plan)


def block_units(run: Run, stack: Mapping[str, nn.Module], rule: LowBitConfig) -> list[registry.BlockUnit]:
    """Return the blocks in which a rule compresses something, with how many weights."""
    found = []
    for prefix in stack:
        names = [name for name, own in run.targets.methods.items() if own is rule and name.startswith(f"{prefix}.")]
        sizes = [features(run.model.get_submodule(name)) for name in names]
        if sizes:
            weights = sum(rows * columns for rows, columns in sizes)
            found.append(registry.BlockUnit(prefix, weights, tuple(sizes)))
    return found


def projection_units(run: Run, stack: Mapping[str, nn.Module], rule: LowBitConfig) -> list[registry.Projection]:
    """Return the key and value projections that a rule compresses in a stack, in order."""
    names = [name for name, own in run.targets.methods.items() if own is rule]
    inside = [name for name in names if any(name.startswith(f"{prefix}.") for prefix in stack)]
    found = [projection_of(run.model, name) for name in inside]
    return [projection for projection in found if projection is not None]


def _adopt(run: Run, pattern: str, numbers: dict[str, Any], recorded: bool) -> None:
    """Put the numbers of a rule into its config, wherever the run holds it."""
    old: Any = dict(rules_of(run.config))[pattern]
    try:
        new = dataclasses.replace(old, layers={**(old.layers or {}), **numbers})
    except ValueError as error:
        if recorded:
            raise CheckpointError(f"the journal's plan does not fit this run: {error}") from error
        raise
    if isinstance(run.config, LowBitRecipe):
        rules = tuple((key, new if key == pattern else rule) for key, rule in run.config.rules)
        run.config = dataclasses.replace(run.config, rules=rules)
    else:
        run.config = new
    for name, own in run.targets.methods.items():
        if own is old:
            run.targets.methods[name] = new


def cosine_sums(
    blocks: Iterator[nn.Module], hidden: list[Tensor], calls: list[list[capture.BlockCall]]
) -> Iterator[Tensor]:
    """Run dense blocks one after the other, yielding for each the sum of the cosines of its input and output.

    Args:
        blocks: in order; the next one is asked for when the one before it is done.
        hidden: hidden states of each batch before the first block, (sequences, length, width).
        calls: for each batch the other arguments of every block.

    Yields:
        (2,), float64: sum over the tokens, and their number. Tokens whose cosine is no number, because one side is all
        zero, do not count.
    """
    for i, block in enumerate(blocks):
        outputs = [capture.hidden_of(out) for out in capture.run_block(block, hidden, [call[i] for call in calls])]
        found = torch.zeros(2, dtype=torch.float64)
        for before, after in zip(hidden, outputs, strict=True):
            a, b = before.double(), after.double()
            cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
            counted = torch.isfinite(cosine)
            found += torch.stack([cosine[counted].sum(), counted.sum()]).cpu()
        hidden = outputs
        yield found
