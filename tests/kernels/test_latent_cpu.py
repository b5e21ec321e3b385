"""The CPU kernels for one new token over latents, against the reference."""

import gc
import weakref

import pytest
import torch

from hf_lowbit.kernels import dispatch, latent_attention, latent_torch
from hf_lowbit.kernels.cpu import latent as cpu
from hf_lowbit.kernels.latent_case import Case
from tests.kernels.test_latent_op import CASES, arguments

NORMED = [name for name, case in CASES.items() if case[8]]
WAYS = ["torch"] + [isa for isa in cpu.ISAS[1:] if cpu.ISAS.index(isa) <= cpu.load()[1]]
# rounded three times to 8 bits on the way, where the reference rounds once at the end
TOLERANCE, LSE_TOLERANCE = 2e-2, 0.05


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Attend in one of the ways that this processor has."""
    if request.param == "torch":
        with dispatch.forced("torch"):
            yield request.param
        return
    library, _, _ = cpu.load()
    monkeypatch.setattr(cpu, "load", lambda: (library, cpu.ISAS.index(request.param), ""))
    with dispatch.forced("cpu"):
        yield request.param


def reference(given):
    return latent_attention.TABLE.kernels["reference"].linear(Case(*given))


def check(given):
    (out, lse), (right, right_lse) = torch.ops.hf_lowbit.latent_decode(*given), reference(given)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert (out.float() - right.float()).norm() < TOLERANCE * right.float().norm()
    assert (lse - right_lse).abs().max() < LSE_TOLERANCE * right_lse.abs().max().clamp(min=1)


@pytest.mark.parametrize("tokens", [1, 33, 600])  # less than a block, two, and more than two chunks
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_give_what_the_reference_gives(case, tokens, way, monkeypatch):
    if way == "torch":
        if case in NORMED:
            assert latent_torch.why_not(Case(*arguments(case, dtype=torch.bfloat16))) is not None
            return
        monkeypatch.setattr(latent_torch, "_MOST", 256)
    check(arguments(case, tokens=tokens, batch=3, dtype=torch.bfloat16))


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("case", ["rotary", "one-head-groups", "partial", "plain"])
def test_codes_are_decoded(case, bits, way):
    check(arguments(case, tokens=40, dtype=torch.bfloat16, bits=bits))


def widened(given, heads, width, rank, groups, tokens):
    """A case of the sizes that models have, in place of the small ones: no filling up, many groups, many rows."""
    generator = torch.Generator().manual_seed(4)
    batch, kv_heads = 2, len(groups)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    count = max(groups) + 1
    given = list(given)
    given[0] = draw(batch, heads, width)
    given[1], given[2] = draw(batch, tokens, rank * count), draw(batch, tokens, rank)
    given[3], given[4] = draw(kv_heads, width, rank) / rank**0.5, draw(kv_heads, width, rank) / rank**0.5
    given[5] = given[6] = given[7] = given[10] = None
    given[8] = torch.arange(tokens).int().expand(batch, -1)
    given[9] = 1 / 10000 ** (torch.arange(width // 2) / (width // 2))
    given[11:15] = list(groups), [rank] * count, [0] * kv_heads, [rank]
    given[15] = width**-0.5
    return given


@pytest.mark.parametrize(
    ("heads", "width", "rank", "groups"),
    [
        (9, 64, 96, (0, 0, 0)),  # SmolLM2-135M
        (20, 128, 64, (0, 1, 1, 0)),  # five queries of a head, groups out of order
        (24, 32, 1056, (0,) * 24),  # tiles that are made in two goes
        (1, 64, 32, (0,)),
    ],
)
def test_sizes_of_models(heads, width, rank, groups, way):
    check(widened(arguments("rotary"), heads, width, rank, groups, tokens=270))


@pytest.mark.parametrize("kind", ["padded", "holes", "far"])
def test_positions_of_every_kind(kind, way):
    given = widened(arguments("rotary"), 4, 64, 32, (0, 0), tokens=600)
    positions = torch.arange(600).repeat(2, 1)
    if kind == "padded":
        positions[1] = (positions[1] - 70).clamp(min=1)
    elif kind == "holes":
        positions[1, 200:] += 17
        positions[0, 300:] -= 300
    else:
        positions = positions + 100_000
    given[8] = positions.int()
    check(given)


def test_a_cache_that_is_not_full_and_rows_apart(way):
    """Static memory: a row of the batch does not follow upon the other."""
    given = widened(arguments("rotary"), 9, 64, 96, (0, 0, 0), tokens=300)
    whole = list(given)
    for at in (1, 2):
        given[at] = whole[at][:, :130]
    given[8] = whole[8][:, :130]
    right = [part.contiguous() if isinstance(part, torch.Tensor) else part for part in given]
    for found, expected in zip(
        torch.ops.hf_lowbit.latent_decode(*given), torch.ops.hf_lowbit.latent_decode(*right), strict=True
    ):
        assert torch.equal(found, expected)
    check(given)


def test_threads_share_a_long_row():
    if cpu.load()[0] is None:
        return
    given = widened(arguments("rotary"), 9, 64, 96, (0, 0, 0), tokens=2100)
    given = [part[:1] if isinstance(part, torch.Tensor) and part.shape[0] == 2 else part for part in given]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with dispatch.forced("cpu"):
                check(given)
    finally:
        torch.set_num_threads(before)


def test_rows_with_the_same_positions_share_their_turns(way):
    given = arguments("rotary", dtype=torch.bfloat16)
    given[8] = given[8][:1].expand(2, -1).contiguous()
    check(given)


def test_a_rotation_of_each_row_matters(way):
    given = arguments("rotary", dtype=torch.bfloat16)
    out, _ = torch.ops.hf_lowbit.latent_decode(*given)
    given[8] = given[8].flip(0)
    other, _ = torch.ops.hf_lowbit.latent_decode(*given)
    assert (out - other).abs().max() > 0.1


def test_a_row_that_sees_nothing_gives_zero(way):
    given = arguments("one-head-groups", dtype=torch.bfloat16)
    given[6] = None  # a bias would be added to it
    given[10] = given[10].clone()
    given[10][0] = False
    out, lse = torch.ops.hf_lowbit.latent_decode(*given)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all() and torch.isfinite(out[1]).all()


@pytest.mark.parametrize("at", [0, 1, 2], ids=["query", "keys", "values"])
def test_nan_is_handed_on(at, way):
    given = arguments("one-head-groups", dtype=torch.bfloat16)
    given[at] = given[at].clone()
    given[at][1] = torch.nan
    given[10] = None  # all is seen
    out, _ = torch.ops.hf_lowbit.latent_decode(*given)
    assert out[1].isnan().all() and torch.isfinite(out[0]).all()


def test_nothing_in_nothing_out(way):
    given = arguments("rotary", dtype=torch.bfloat16)
    none = [part[:0] if isinstance(part, torch.Tensor) and part.shape[0] == 2 else part for part in given]
    out, lse = torch.ops.hf_lowbit.latent_decode(*none)
    assert out.shape == (0, 9, 8) and lse.shape == (0, 9)


@pytest.mark.parametrize("case", NORMED)
def test_norms_of_keys_do_not_go_to_torch(case):
    given = arguments(case, dtype=torch.bfloat16)
    assert latent_attention.choose(Case(*given)).name != "torch"
    with dispatch.forced("torch"), pytest.raises(RuntimeError, match="a norm of the keys needs the keys"):
        torch.ops.hf_lowbit.latent_decode(*given)


def test_what_is_taken_and_why():
    reasons = latent_attention.reasons(Case(*arguments("rotary")))
    assert reasons["cpu"] == "cannot: computes in bfloat16, q is torch.float32, keys are torch.float32"
    assert reasons["reference"].startswith("taken: ")
    taken = "cpu" if cpu.load()[0] is not None else "torch"
    assert latent_attention.choose(Case(*arguments("rotary", dtype=torch.bfloat16))).name == taken


def test_without_the_library_torch_takes_over(monkeypatch):
    monkeypatch.setattr(cpu, "load", lambda: (None, 0, "no compiled library: it was not built"))
    case = Case(*arguments("rotary", dtype=torch.bfloat16))
    assert latent_attention.choose(case).name == "torch"
    assert latent_attention.reasons(case)["cpu"] == "cannot: no compiled library: it was not built"


class TestWhatIsKept:
    """Factors are prepared once, anew when they change, and dropped with them."""

    def test_once(self):
        case = Case(*arguments("rotary", dtype=torch.bfloat16))
        assert cpu.prepared(case) is cpu.prepared(case._replace(q=torch.zeros_like(case.q)))

    @pytest.mark.parametrize("name", ["up_k", "up_v", "bias_k", "inv_freq"])
    def test_anew_when_a_tensor_is_written_to(self, name):
        case = Case(*arguments("one-head-groups", dtype=torch.bfloat16))
        before = cpu.prepared(case)
        getattr(case, name).mul_(2)
        assert cpu.prepared(case) is not before

    def test_anew_with_other_groups(self):
        case = Case(*arguments("one-head-groups", dtype=torch.bfloat16))
        before = cpu.prepared(case)
        assert cpu.prepared(case._replace(groups_k=[1, 0, 2, 3])) is not before

    @pytest.mark.parametrize("name", ["bias_k", "bias_v", "inv_freq"])
    def test_what_was_copied_is_held(self, name):
        """Else another tensor could be found at its place, and be taken for it."""
        case = Case(*arguments("one-head-groups", dtype=torch.bfloat16))
        cpu.prepared(case)
        tensor = weakref.ref(getattr(case, name))
        case = case._replace(**{name: None})
        gc.collect()
        assert tensor() is not None

    def test_dropped_with_the_factor(self):
        case = Case(*arguments("rotary", dtype=torch.bfloat16))
        cpu.prepared(case)
        count = len(cpu._PREPARED)
        del case
        gc.collect()
        assert len(cpu._PREPARED) < count


def test_float32_goes_to_the_reference():
    assert latent_attention.choose(Case(*arguments("rotary"))).name == "reference"
