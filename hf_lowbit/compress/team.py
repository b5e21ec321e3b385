"""The processes that work on one compression run, as ``torchrun`` starts them; one process alone is a team of one.

Each process runs its own share of the calibration batches; second moments are added up, so that all have the same.
Then each compresses its own share of a block's layers, writes them into the journal, and hands them to the others, so
that all have the whole block for the next one. A run without data gives the same bytes whatever the size of the team;
a calibrated one adds the same numbers in another order, in float64, which leaves the float32 result as it is but for
rare last bits.

A process that dies takes the run with it: the others stop within moments, because a connection breaks in the middle of
what they do together or because ``torchrun`` ends them, and say how to go on.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from hf_lowbit.calibration.stats import LinearStats
from hf_lowbit.compress.parcel import layer_of, tensors_of
from hf_lowbit.errors import TeamError
from hf_lowbit.formats import Format

logger = logging.getLogger(__name__)
T = TypeVar("T")
Result = tuple[Format, dict[str, Any], Tensor | None]
# How long a process waits for the others. A large layer takes longer than the half hour that torch would wait; that a
# process is gone, broken connections and torchrun tell.
PATIENCE = datetime.timedelta(days=7)
HOW_TO_GO_ON = (
    "what is finished is in the journal; run the same command again with --resume (in Python, with a journal, "
    "RunOptions(resume=True))"
)


def join() -> None:
    """Join the processes that ``torchrun`` or ``accelerate launch`` started, unless they have been joined already."""
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
        in_main = threading.current_thread() is threading.main_thread()  # no other may set a handler
        if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _stop)  # what torchrun sends when another process has ended


def leave() -> None:
    """Part from the others, after waiting for them."""
    if dist.is_available() and dist.is_initialized():
        with _together():
            dist.barrier()
        dist.destroy_process_group()
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGTERM) is _stop:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(number: int, frame: Any) -> NoReturn:
    """End this process as an error would, so that it removes what it has half written."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    sys.stderr.write(
        f"process {rank}: stopped, because another process of this run has ended or the run was asked to stop; "
        f"{HOW_TO_GO_ON}\n"
    )
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Say what it means when something that all processes do at once fails.

    Raises:
        TeamError: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:  # of gloo and NCCL: a connection was closed, or nobody answered in time
        raise TeamError(f"another process of this run has ended, so this one stops; {HOW_TO_GO_ON}") from error


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

    def refuse_few(self, batches: int) -> None:
        """Refuse to go on with processes that would have nothing to gather statistics from.

        Raises:
            ValueError: there are fewer calibration batches than processes.
        """
        if batches < self.size:
            raise ValueError(
                f"{batches} calibration batches cannot be shared by {self.size} processes; lower run.batch_size "
                "(--batch-size) or start fewer"
            )

    def owners(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return to which process each of some layers falls: the largest first, to whoever has least so far.

        Args:
            sizes: numbers of weights by name, the same in all processes.
        """
        load = [0] * self.size
        found = {}
        for name in sorted(sizes, key=lambda name: -sizes[name]):  # stable: equal ones in order
            found[name] = load.index(min(load))
            load[found[name]] += sizes[name]
        return found

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.size > 1:
            with _together():
                dist.barrier()

    def smallest(self, number: int) -> int:
        """Return the smallest of the numbers that the processes hold."""
        if self.size == 1:
            return number
        value = torch.tensor(number, device=self._device)
        with _together():
            dist.all_reduce(value, dist.ReduceOp.MIN)
        return int(value)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.size == 1:
            return values
        summed = values.to(self._device, copy=True)
        with _together():
            dist.all_reduce(summed)
        return summed.to(values.device)

    def add_up(self, stats: dict[str, LinearStats]) -> None:
        """Add the statistics of all processes, in place; statistics that several layers share are added once.

        Where processes do not agree on what is shared, because a layer had no input in one of them, nothing is.

        Args:
            stats: by name of the layer; the same names in the same order in all processes.
        """
        if self.size == 1:
            return
        first: dict[int, str] = {}
        shared = [first.setdefault(id(one), name) for name, one in stats.items()]
        if any(other != shared for other in self.gather(shared)):
            for name, owner in zip(list(stats), shared, strict=True):
                stats[name] = stats[name] if owner == name else stats[name].copied(name)
        for each in {id(one): one for one in stats.values()}.values():
            counts = torch.tensor([each.tokens, each.sequences], device=self._device)
            total = each.total.to(self._device)
            with _together():
                dist.all_reduce(counts)
                dist.all_reduce(total)
            each.total = total.to(each.total.device)
            each.tokens, each.sequences = map(int, counts)
            if each.keep:
                self._add_up_sample(each)

    def _add_up_sample(self, stats: LinearStats) -> None:
        """Add the samples of all processes, in the order of the batches as one process has them."""
        if self.size == 1:
            return
        own = {f"{i:06d}": rows.contiguous() for i, rows in enumerate(stats.kept)}
        found = [list(dict(sorted(load(part).items())).values()) for part in self._collect(save(own))]
        most = max(map(len, found))
        stats.kept = [rows[i] for i in range(most) for rows in found if i < len(rows)]
        ends = self.gather([stats.low, stats.high])
        stats.low, stats.high = min(low for low, _ in ends), max(high for _, high in ends)

    def gather(self, value: Any, failure: Exception | None = None) -> list[Any]:
        """Return a value of every process, in order of their ranks.

        Args:
            value: of JSON types.
            failure: what went wrong in this process instead.

        Raises:
            Exception: ``failure``, in the process where it happened.
            TeamError: in the others.
        """
        if self._is_alone(failure):
            return [value]
        said: dict[str, Any] = {"value": value} if failure is None else {"failure": _told(failure)}
        found = [json.loads(message) for message in self._collect(json.dumps(said).encode())]
        self._raise_first(found, failure)
        return [one["value"] for one in found]

    def exchange(self, names: Sequence[str], own: dict[str, Result], failure: Exception | None) -> dict[str, Result]:
        """Return the packed layers of all processes.

        Args:
            names: of the layers; :meth:`share` says which fell to this process.
            own: packed layer, report row and changed weight (or None) of those, by name.
            failure: what went wrong in this process instead.

        Raises:
            Exception: ``failure``, in the process where it happened.
            TeamError: in the others.
        """
        if self._is_alone(failure):
            return own
        found: dict[str, Result] = {}
        parts = [_read(message) for message in self._collect(_written(own, failure))]
        self._raise_first([rows for rows, _ in parts], failure)
        for owner, (rows, tensors) in enumerate(parts):
            if owner == self.rank:
                found |= own
            else:
                for name, row in rows.items():
                    layer = layer_of(name, row["table"], tensors)
                    found[name] = layer, row["report"], tensors.get(f"{name}{_CHANGED}")
        return {name: found[name] for name in names}

    def _is_alone(self, failure: Exception | None) -> bool:
        """Return whether nobody has to be told, and raise what went wrong if so."""
        if self.size == 1 and failure is not None:
            raise failure
        return self.size == 1

    def _raise_first(self, found: Sequence[Mapping[str, Any]], failure: Exception | None) -> None:
        """Raise what went wrong in the first process that says so."""
        for owner, said in enumerate(found):
            if "failure" in said:
                raise failure if owner == self.rank and failure else TeamError(f"process {owner}: {said['failure']}")

    def _collect(self, message: bytes) -> list[bytes]:
        """Return the messages of all processes, in order of their ranks."""
        return [self._broadcast(message if rank == self.rank else b"", rank) for rank in range(self.size)]

    def _broadcast(self, message: bytes, owner: int) -> bytes:
        length = torch.tensor(len(message), device=self._device)
        with _together():
            dist.broadcast(length, owner)
        content = torch.empty(int(length), dtype=torch.uint8, device=self._device)
        if owner == self.rank:
            content.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))
        with _together():
            dist.broadcast(content, owner)
        return message if owner == self.rank else bytes(content.cpu().numpy())


_CHANGED = ".changed"


def _told(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"


def _written(own: dict[str, Result], failure: Exception | None) -> bytes:
    """Return a message: length of the rows, the rows as JSON, the tensors as safetensors."""
    rows: dict[str, Any] = {
        name: {"table": {"format": packed.name, "spec": packed.spec.to_json()}, "report": report}
        for name, (packed, report, _) in own.items()
    }
    if failure is not None:
        rows, own = {"failure": _told(failure)}, {}
    text = json.dumps(rows).encode()
    tensors = tensors_of({name: packed for name, (packed, _, _) in own.items()})
    tensors |= {
        f"{name}{_CHANGED}": changed.cpu().contiguous() for name, (_, _, changed) in own.items() if changed is not None
    }
    return len(text).to_bytes(8, "little") + text + save(tensors)


def _read(message: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    length = int.from_bytes(message[:8], "little")
    rows: dict[str, Any] = json.loads(message[8 : 8 + length])
    return rows, load(message[8 + length :])
