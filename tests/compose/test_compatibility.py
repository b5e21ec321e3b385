"""The table of what works together: as full as the registry, and what it says is what happens."""

import json
import types

import pytest
import torch

from benchmarks import compatibility, report_compatibility
from benchmarks.compatibility import HOSTS, OPTIONS, attempt, groups
from hf_lowbit import registry

TRIES = report_compatibility.read()["tries"]
CASES = {f"{host.name}: {' + '.join(methods)}": (host, methods) for host in HOSTS for methods in groups(host)}
# of each kind of model what works and what is refused, and why; the slow part tries all
FEW = (
    "language model: arb + pbs2p",
    "language model: adasvd + recalkv",
    "language model: arb + quantcache",
    "video transformer: dvd_quant + quantcache",
    "video transformer: dvd_quant + recalkv",
    "video transformer: bidrn",
    "super-resolution model: arb + condiquant",
    "convolutional network: bidrn",
    "convolutional network: arb + bidrn",
)


@pytest.fixture(autouse=True)
def progress_as_before():
    """Progress bars of the libraries are one switch for the whole process."""
    import diffusers
    import transformers

    yield
    transformers.utils.logging.enable_progress_bar()
    diffusers.utils.logging.enable_progress_bar()


def outcome(case):
    host, methods = CASES[case]
    return attempt(methods, host)


def recorded(case):
    host, methods = CASES[case]
    return TRIES[host.name][" + ".join(methods)]


def test_every_pair_of_the_registry_was_tried():
    assert set(OPTIONS) == set(registry.methods())
    assert list(TRIES) == [host.name for host in HOSTS]
    for host in HOSTS:
        assert list(TRIES[host.name]) == [" + ".join(methods) for methods in groups(host)]
    pairs = len(OPTIONS) * (len(OPTIONS) + 1) // 2
    assert all(len(TRIES[host.name]) == pairs for host in HOSTS if host.only is None)


@pytest.mark.parametrize("case", FEW)
def test_what_the_table_says_happens(case):
    assert outcome(case) == recorded(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in FEW])
def test_what_the_whole_table_says_happens(case):
    assert outcome(case) == recorded(case)


def test_a_method_that_holds_nothing_is_no_success(monkeypatch):
    host = HOSTS[0]
    monkeypatch.setattr(compatibility, "recipe_of", lambda methods, own: compatibility.config_of("arb", own))
    with pytest.raises(RuntimeError, match="adasvd and arb in a language model: adasvd holds nothing"):
        attempt(("adasvd", "arb"), host)


def test_a_model_that_comes_back_different_is_no_success(monkeypatch):
    calls = iter(range(10))
    host = compatibility.dataclasses.replace(HOSTS[0], run=lambda model: torch.tensor(next(calls)))
    with pytest.raises(RuntimeError, match="the loaded model differs"):
        attempt(("arb",), host)


def refuses(model, config):
    model.lm_head = torch.nn.Identity()
    raise ValueError("no")


def as_of_the_package(function):
    """Return a function as if it were defined in a module of the package."""
    return types.FunctionType(function.__code__, {**globals(), "__name__": "hf_lowbit.somewhere"}, function.__name__)


@pytest.mark.parametrize(
    "slip", [lambda *_: len(None), lambda *_: int("x"), lambda *_: json.loads("x"), lambda *_: torch.zeros(2, "x")]
)
def test_an_error_that_the_package_does_not_raise_is_no_refusal(monkeypatch, slip):
    """Slips are TypeError and ValueError as well, in the package itself and in what it calls."""
    monkeypatch.setattr(compatibility.hf_lowbit, "quantize", as_of_the_package(slip))
    with pytest.raises((TypeError, ValueError)):
        attempt(("arb",), HOSTS[0])


def test_a_refusal_after_work_was_done_is_none(monkeypatch):
    monkeypatch.setattr(compatibility.hf_lowbit, "quantize", as_of_the_package(refuses))
    with pytest.raises(RuntimeError, match="arb in a language model: refused after work was done"):
        attempt(("arb",), HOSTS[0])


def test_a_refusal_is_what_the_package_raises(monkeypatch):
    monkeypatch.setattr(compatibility, "_state", lambda model: 0)
    monkeypatch.setattr(compatibility.hf_lowbit, "quantize", as_of_the_package(refuses))
    assert attempt(("arb",), HOSTS[0]) == "no"
    monkeypatch.setattr(compatibility.hf_lowbit, "quantize", refuses)
    with pytest.raises(ValueError, match="no"):
        attempt(("arb",), HOSTS[0])


def test_the_page_shows_sentences_as_they_are(monkeypatch):
    found = {
        "tries": {"kind": {"arb": None, "arb + recalkv": "rule '*.a_b' is [wrong]"}},
        "environment": {"packages": {"torch": "2"}, "command": "python -m x", "commit": "abc"},
    }
    monkeypatch.setattr(report_compatibility, "read", lambda: json.loads(json.dumps(found)))
    page = report_compatibility.compatibility()
    assert "0 of 1 pairs work" in page
    assert r"1. rule '\*.a\_b' is \[wrong\]" in page
    row = next(line for line in page.splitlines() if line.startswith("| **arb**"))
    assert row.count("yes") == 1
    assert row.count("[1]") == 1
    assert row.count("–") == len(registry.methods()) - 2
