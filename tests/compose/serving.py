"""Many requests on one model at the same time, some of them broken off; and whether memory grows meanwhile.

Run by ``tests/compose/test_concurrency.py`` on tiny models, and on a real one in its slow part.
"""

import contextlib
import ctypes
import dataclasses
import gc
import queue
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

THREADS = 16
PAD = 0


class Cancelled(Exception):
    """Raised inside a request, as a server does when its client has gone."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A batch of prompts of different lengths, padded on the left.

    Attributes:
        prompts: token ids of each row.
        tokens: to be generated.
        ends: None; "stop" (a stopping criterion says so), "raise" (it raises) or "inside" (a layer in the middle of a
            forward pass raises).
        after: tokens after which it ends so.
    """

    prompts: tuple[tuple[int, ...], ...]
    tokens: int
    ends: str | None = None
    after: int = 1


def requests(count: int, vocabulary: int, tokens: int, longest: int = 24, seed: int = 0) -> list[Request]:
    """Requests of one to four rows; every fourth one is broken off, in one of three ways."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        rows = draw.randint(1, 4)
        prompts = tuple(
            tuple(draw.randrange(3, vocabulary) for _ in range(draw.randint(1, longest))) for _ in range(rows)
        )
        ends = ("stop", "raise", "inside")[number // 4 % 3] if number % 4 == 3 else None
        found.append(Request(prompts, tokens, ends, draw.randint(1, max(1, tokens - 1))))
    return found


class _Ends(StoppingCriteria):
    def __init__(self, request: Request, fuse: Any) -> None:
        self.request, self.fuse, self.seen = request, fuse, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.seen += 1
        due = self.seen >= self.request.after
        if due and self.request.ends == "raise":
            raise Cancelled
        self.fuse.burns = due and self.request.ends == "inside"
        return torch.full((len(input_ids),), due and self.request.ends == "stop")


@contextlib.contextmanager
def fused(model: Any) -> Iterator[Any]:
    """Give a model's last block a fuse: where a thread lights its own, that thread's forward pass raises there."""
    fuse = threading.local()

    def burn(*_: Any) -> None:
        if getattr(fuse, "burns", False):
            fuse.burns = False
            raise Cancelled

    layer = next(module for name, module in reversed([*model.named_modules()]) if name.endswith("o_proj"))
    handle = layer.register_forward_pre_hook(burn)
    try:
        yield fuse
    finally:
        handle.remove()


def answer(model: Any, request: Request, fuse: Any) -> list[list[int]] | None:
    """Generate greedily; return what was written after each prompt, None if the request was broken off by an error."""
    length = max(map(len, request.prompts))
    ids = torch.tensor([[PAD] * (length - len(row)) + list(row) for row in request.prompts])
    seen = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in request.prompts])
    ends = StoppingCriteriaList([_Ends(request, fuse)] if request.ends else [])
    try:
        out = model.generate(
            ids,
            attention_mask=seen,
            do_sample=False,
            max_new_tokens=request.tokens,
            min_new_tokens=request.tokens if request.ends is None else None,
            pad_token_id=PAD,
            stopping_criteria=ends,
        )
    except Cancelled:
        return None
    finally:
        fuse.burns = False
    return out[:, length:].tolist()


def one_by_one(model: Any, asked: list[Request]) -> list[Any]:
    """Answers when there is never more than one request, in one thread."""
    with fused(model) as fuse:
        return [answer(model, request, fuse) for request in asked]


def together(model: Any, asked: list[Request], threads: int = THREADS) -> list[Any]:
    """Answers from as many threads, which start at the same moment and end with the last request.

    Raises:
        Exception: the first of those that a request raised and was not meant to.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(asked)):
        waiting.put(number)
    found: list[Any] = [None] * len(asked)
    failures: list[BaseException] = []
    start = threading.Barrier(threads)

    def work(fuse: Any) -> None:
        start.wait()
        with contextlib.suppress(queue.Empty):
            while not failures:
                number = waiting.get_nowait()
                try:
                    found[number] = answer(model, asked[number], fuse)
                except BaseException as error:  # raised below, in the thread of the test
                    failures.append(error)

    with fused(model) as fuse:
        workers = [threading.Thread(target=work, args=(fuse,)) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if failures:
        raise failures[0]
    return found


@dataclasses.dataclass(frozen=True)
class Held:
    """What the process holds between two waves of requests: bytes in memory, and tensors known to Python."""

    resident: int
    tensors: int


def held() -> Held:
    """Look, after all that can be let go of is let go of."""
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are asked for their class
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    return Held(psutil.Process().memory_info().rss, tensors)


def watched(wave: Callable[[], Any], waves: int) -> list[Held]:
    """Run waves of requests and look after each."""
    found = []
    for _ in range(waves):
        wave()
        found.append(held())
    return found


def growth(seen: list[Held], warm_up: int) -> tuple[float, int]:
    """Growth after a warm-up, from the earlier half to the later one: median of bytes, least number of tensors."""
    rest = seen[warm_up:]
    half = len(rest) // 2
    early, late = rest[:half], rest[-half:]

    def middle(part: list[Held]) -> float:
        return sorted(one.resident for one in part)[len(part) // 2]

    return middle(late) - middle(early), min(one.tensors for one in late) - min(one.tensors for one in early)
