"""Layers that share a call, used by several threads: another thread may act between any two lines of theirs."""

import sys
import threading

import pytest
import torch

from hf_lowbit.kernels import ready
from hf_lowbit.kernels.cpu import binary
from hf_lowbit.kernels.cpu.library import load
from tests.kernels.compiled import needs
from tests.kernels.test_ready import Attention, expected

pytestmark = needs(load)


def with_interruption(call, interruption, at):
    """Return a call's result and whether ``interruption`` ran before line number ``at`` of those in ready.py."""
    count, file = 0, ready.__file__

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename != file:
            return None
        if event == "line" and not ready._GROUPING.locked():  # who wants it would wait there
            count += 1
            if count == at:
                sys.settrace(None)
                interruption()
                sys.settrace(trace)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        found = call()
    finally:
        sys.settrace(before)
    return found, count >= at


def in_another_thread(function):
    def run():
        failures = []

        def guarded():
            try:
                with torch.no_grad():
                    function()
            except Exception as error:  # a thread's errors are seen by nobody else
                failures.append(error)

        thread = threading.Thread(target=guarded)
        thread.start()
        thread.join(30)
        assert not failures
        assert not thread.is_alive()

    return run


def sharing_model():
    torch.manual_seed(0)
    model = Attention()
    for _ in range(2):
        model(torch.randn(1, 256).bfloat16())
    assert model.groups()[0] is not None
    return model


def other_thread(model, kind):
    """What another thread does in one go."""
    if kind == "ends the sharing":
        return model.groups()[0]._dissolve
    if kind == "has requests":
        return lambda: [model(torch.randn(1, 256).bfloat16()) for _ in range(2)]
    return lambda: [model.q_proj(torch.randn(1, 256).bfloat16()) for _ in range(5)]  # breaks off after one layer


@pytest.mark.parametrize("kind", ["ends the sharing", "has requests", "breaks off"])
def test_another_thread_between_any_two_lines(kind):
    with torch.no_grad():
        reached, at = True, 0
        while reached:
            at += 1
            model = sharing_model()
            x = torch.randn(1, 256).bfloat16()
            interruption = in_another_thread(other_thread(model, kind))
            found, reached = with_interruption(lambda model=model, x=x: model(x), interruption, at)
            assert torch.equal(found, expected(model, x)), at
    assert at > 20


def test_threads_that_find_a_group_at_once_make_one():
    with torch.no_grad():
        reached, at = True, 0
        while reached:
            at += 1
            torch.manual_seed(0)
            model = Attention()
            x, y = torch.randn(2, 1, 256).bfloat16()
            model(x)
            other = in_another_thread(lambda model=model: [model(torch.randn(1, 256).bfloat16()) for _ in range(2)])
            found, reached = with_interruption(lambda model=model, y=y: model(y), other, at)
            assert torch.equal(found, expected(model, y))
            model(x)
            q, k, v, o = model.groups()
            assert q is k is v is not None
            assert o is None
            assert set(q._members) == {own._last[3] for own in (model.q_proj, model.k_proj, model.v_proj)}
    assert at > 20


def test_requests_broken_off_now_and_then_do_not_end_the_sharing():
    with torch.no_grad():
        model = sharing_model()
        group = model.groups()[0]
        for _ in range(10):
            for _ in range(9):
                model(torch.randn(1, 256).bfloat16())
            model.q_proj(torch.randn(1, 256).bfloat16())
        assert model.groups()[0] is group
        for _ in range(4):  # but a model that always takes another way does
            model.q_proj(torch.randn(1, 256).bfloat16())
        assert model.groups()[0] is None


def test_a_tensor_that_is_used_for_ever_fills_no_list():
    with torch.no_grad():
        torch.manual_seed(0)
        model, x = Attention(), torch.randn(1, 256).bfloat16()
        for _ in range(ready._MOST_MEMBERS + 10):
            model.q_proj(x)
        assert len(ready._LAST.members) == ready._MOST_MEMBERS


def test_a_weight_is_prepared_once_for_all_threads(monkeypatch):
    made = []
    original = binary.Prepared.__init__

    def counted(self, *arguments):
        made.append(threading.get_ident())
        barrier_passed.wait(0.2)  # long enough for all others to arrive
        original(self, *arguments)

    barrier_passed = threading.Event()
    monkeypatch.setattr(binary.Prepared, "__init__", counted)
    torch.manual_seed(0)
    layer, x = Attention().q_proj, torch.randn(1, 256).bfloat16()
    found = []
    start = threading.Barrier(8)

    def work():
        start.wait()
        with torch.no_grad():
            found.append(layer(x))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(found) == 8
    assert all(torch.equal(one, found[0]) for one in found)
