"""The processes that work on one compression run, as ``torchrun`` starts them; one process alone is a team of one.

Each process runs its own share of the calibration batches; second moments are added up, so that all have the same.
Then each compresses its own share of a block's layers and hands them to the others, so that all have the whole block
for the next one. A run without data gives the same bytes whatever the size of the team; a calibrated one adds the
same numbers in another order, in float64, which leaves the float32 result as it is but for rare last bits.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from hf_lowbit.calibration.stats import LinearStats
from hf_lowbit.compress.parcel import layer_of, tensors_of
from hf_lowbit.formats import Format

logger = logging.getLogger(__name__)
T = TypeVar("T")
Result = tuple[Format, dict[str, Any]]


def join() -> None:
    """Join the processes that ``torchrun`` started, unless it did not or the program has done so."""
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("gloo")


def leave() -> None:
    """Part from the others, after waiting for them."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class Team:
    """This process among its peers.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        if dist.is_available() and dist.is_torchelastic_launched() and not together:
            logger.warning(
                "torchrun started several processes; each compresses alone until init_process_group is called"
            )
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        on_gpu = together and dist.get_backend() == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    @property
    def leads(self) -> bool:
        """Whether this process is the one that shows progress and writes files."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Return the items that fall to this process."""
        return list(items[self.rank :: self.size])

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.size > 1:
            dist.barrier()

    def smallest(self, number: int) -> int:
        """Return the smallest of the numbers that the processes hold."""
        if self.size == 1:
            return number
        value = torch.tensor(number, device=self._device)
        dist.all_reduce(value, dist.ReduceOp.MIN)
        return int(value)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.size == 1:
            return values
        summed = values.to(self._device, copy=True)
        dist.all_reduce(summed)
        return summed.to(values.device)

    def add_up(self, stats: Iterable[LinearStats]) -> None:
        """Add the statistics of all processes, in place; statistics that several layers share are added once."""
        if self.size == 1:
            return
        for each in {id(one): one for one in stats}.values():
            counts = torch.tensor([each.tokens, each.sequences], device=self._device)
            dist.all_reduce(counts)
            total = each.total.to(self._device)
            dist.all_reduce(total)
            each.total = total.to(each.total.device)
            each.tokens, each.sequences = map(int, counts)

    def exchange(self, names: Sequence[str], own: dict[str, Result], failure: Exception | None) -> dict[str, Result]:
        """Return the packed layers of all processes.

        Args:
            names: of the layers; :meth:`share` says which fell to this process.
            own: packed layer and report row of those, by name.
            failure: what went wrong in this process instead.

        Raises:
            Exception: ``failure``, in the process where it happened.
            RuntimeError: in the others.
        """
        if self.size == 1:
            if failure is not None:
                raise failure
            return own
        found: dict[str, Result] = {}
        for owner in range(self.size):
            message = _written(own, failure) if owner == self.rank else b""
            rows, tensors = _read(self._broadcast(message, owner))
            if "failure" in rows:
                raise (
                    failure if owner == self.rank and failure else RuntimeError(f"process {owner}: {rows['failure']}")
                )
            if owner == self.rank:
                found |= own
            else:
                found |= {name: (layer_of(name, row["table"], tensors), row["report"]) for name, row in rows.items()}
        return {name: found[name] for name in names}

    def _broadcast(self, message: bytes, owner: int) -> bytes:
        length = torch.tensor(len(message), device=self._device)
        dist.broadcast(length, owner)
        content = torch.empty(int(length), dtype=torch.uint8, device=self._device)
        if owner == self.rank:
            content.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))
        dist.broadcast(content, owner)
        return bytes(content.cpu().numpy())


def _written(own: dict[str, Result], failure: Exception | None) -> bytes:
    """Return a message: length of the rows, the rows as JSON, the tensors as safetensors."""
    rows: dict[str, Any] = {
        name: {"table": {"format": packed.name, "spec": packed.spec.to_json()}, "report": report}
        for name, (packed, report) in own.items()
    }
    if failure is not None:
        rows, own = {"failure": f"{type(failure).__name__}: {failure}"}, {}
    text = json.dumps(rows).encode()
    return (
        len(text).to_bytes(8, "little") + text + save(tensors_of({name: packed for name, (packed, _) in own.items()}))
    )


def _read(message: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    length = int.from_bytes(message[:8], "little")
    rows: dict[str, Any] = json.loads(message[8 : 8 + length])
    return rows, load(message[8 + length :])
