"""The ops of format ``binary`` against a loop over single weights, written from the definition in the reference."""

import dataclasses
import itertools
import shutil

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lowbit.formats import BinaryFormat, BinarySpec
from hf_lowbit.kernels import reference
from hf_lowbit.layers import PackedLinear

DEQUANTIZE = torch.ops.hf_lowbit.binary_dequantize.default
LINEAR = torch.ops.hf_lowbit.binary_linear.default
EPS = 2.0**-24  # relative error of one rounding to float32


def plane(bits: Tensor) -> Tensor:
    """P128 plane of (n, k) bools, bit by bit, without the function that the package packs with."""
    rows, columns = bits.shape
    out = [[0] * (-(-columns // 128) * 16) for _ in range(rows)]
    for i, row in enumerate(bits.tolist()):
        for column, bit in enumerate(row):
            group, within = divmod(column, 128)
            out[i][16 * group + within % 16] |= bit << (within // 16)
    return torch.tensor(out, dtype=torch.uint8)


@dataclasses.dataclass
class Case:
    """Random parts of one ``binary`` weight, not packed."""

    n: int
    m: int
    groups: int = 2
    salient_groups: int = 0
    shift: bool = False
    columns: bool = False
    keep: tuple[int, int] = (0, 0)
    block: int = 32
    dtype: torch.dtype = torch.float16
    seed: int = 0

    def __post_init__(self):
        random = torch.Generator().manual_seed(self.seed)
        n, m, g, s = self.n, self.m, self.groups, self.salient_groups
        blocks = -(-m // self.block)

        def bits(*shape):
            return torch.rand(shape, generator=random) < 0.5

        def scales(*shape, signed=False):
            values = torch.rand(shape, generator=random) + 0.25
            return ((values * torch.where(bits(*shape), 1, -1)) if signed else values).to(self.dtype)

        self.sign = bits(n, m)
        self.code = torch.randint(g, (n, m), generator=random)
        self.salient = torch.randperm(m, generator=random)[: max(m // 5, 1)].sort().values if s else None
        if s > 1:  # a salient column has only the codes of the salient groups
            self.code[:, self.salient] %= s
        self.row_scale = scales(2 * s + g, blocks, n)
        self.row_shift = scales(s + g, blocks, n, signed=True) if self.shift else None
        self.col_scale = scales(max(s, g), m) if self.columns else None
        self.sign2 = bits(n, len(self.salient)) if s else None
        self.col_scale2 = scales(s, len(self.salient)) if s and self.columns else None
        self.mask = self._random_mask(random) if self.keep[1] else None

    def _random_mask(self, random):
        keep_n, keep_m = self.keep
        mask = torch.zeros((self.n, self.m), dtype=torch.bool)
        for i, start in itertools.product(range(self.n), range(0, self.m, keep_m)):
            width = min(keep_m, self.m - start)
            kept = -(-keep_n * width // keep_m)
            mask[i, start + torch.randperm(width, generator=random)[:kept]] = True
        return mask

    def dense(self) -> tuple[Tensor, Tensor]:
        """The weight in float64 and, for bounds, the sum of the magnitudes of its terms."""
        g, s = self.groups, self.salient_groups
        where = {} if self.salient is None else {column: k for k, column in enumerate(self.salient.tolist())}
        weight = torch.zeros((self.n, self.m), dtype=torch.float64)
        magnitude = torch.zeros_like(weight)
        for i, j in itertools.product(range(self.n), range(self.m)):
            if self.mask is not None and not self.mask[i, j]:
                continue
            b, h = j // self.block, int(self.code[i, j])
            if j in where and s == 1:
                h = 0
            entry = h if j in where else s + h
            sign = 1.0 if self.sign[i, j] else -1.0
            terms = [sign * float(self.row_scale[entry, b, i])]
            if self.col_scale is not None:
                terms[0] *= float(self.col_scale[h, j])
            if self.row_shift is not None:
                terms.append(float(self.row_shift[entry, b, i]))
            if j in where:
                second = (1.0 if self.sign2[i, where[j]] else -1.0) * float(self.row_scale[s + g + h, b, i])
                if self.col_scale2 is not None:
                    second *= float(self.col_scale2[h, where[j]])
                terms.append(second)
            weight[i, j] = sum(terms)
            magnitude[i, j] = sum(map(abs, terms))
        return weight, magnitude

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The packed tensors, in the order of the schema."""

        def kept(bits):
            if self.mask is None:
                return bits
            return torch.stack([row[keep] for row, keep in zip(bits, self.mask, strict=True)])

        planes = {1: 0, 2: 1, 3: 2, 4: 2}[self.groups]
        group = torch.stack([plane(kept(self.code // 2**p % 2 == 1)) for p in range(planes)]) if planes else None
        return (
            plane(kept(self.sign)),
            self.row_scale,
            group,
            self.row_shift,
            self.col_scale,
            None if self.salient is None else self.salient.to(torch.int32),
            None if self.sign2 is None else plane(self.sign2),
            self.col_scale2,
            None if self.mask is None else plane(self.mask),
        )

    def sizes(self) -> tuple[int, int, int, int]:
        return (self.m, self.block, *self.keep)

    def linear_args(self, x: Tensor, bias: Tensor | None) -> tuple:
        return (x, *self.tensors(), bias, *self.sizes())

    def module(self, bias: Tensor | None = None) -> PackedLinear:
        spec = BinarySpec(
            self.n,
            self.m,
            block_size=self.block,
            groups=self.groups,
            salient=0 if self.salient is None else len(self.salient),
            salient_groups=self.salient_groups,
            shift=self.shift,
            col_scales=self.columns,
            scale_dtype=str(self.dtype).removeprefix("torch."),
            keep_n=self.keep[0],
            keep_m=self.keep[1],
        )
        packed = BinaryFormat(spec, *self.tensors())
        packed.validate("case")
        return PackedLinear(packed, bias, torch.float32)


GROUPS = [(groups, salient) for groups in (1, 2, 3, 4) for salient in (0, 1, 2) if salient <= groups]
# Sizes that no block, no N:M group and no plane divides: 40 is one short plane, 72 = 2 x 32 + 8, 130 = 128 + 2.
SIZES = [(40, 32), (72, 32), (130, 128), (130, 48), (72, 100)]
KEEP = [(0, 0), (2, 4), (3, 5), (1, 1), (4, 7)]


def every_combination():
    for number, (groups, shift, columns, keep) in enumerate(
        itertools.product(GROUPS, (False, True), (False, True), KEEP)
    ):
        m, block = SIZES[number % len(SIZES) - number // len(KEEP) % len(SIZES)]
        dtype = (torch.float16, torch.float32, torch.bfloat16)[number % 3]
        yield Case(3, m, *groups, shift, columns, keep, block, dtype, seed=number)


# One rich case per feature, for the tests that would be slow on all of them.
FEW = {
    "plain": Case(5, 40, groups=1),
    "one row": Case(1, 72, groups=2, salient_groups=1, columns=True),
    "four groups": Case(4, 130, groups=4, salient_groups=2, columns=True, block=48),
    "shift": Case(4, 130, groups=3, salient_groups=2, shift=True, block=128),
    "pruned": Case(4, 72, groups=2, salient_groups=2, shift=True, columns=True, keep=(3, 5), dtype=torch.float32),
}
few = pytest.mark.parametrize("case", FEW.values(), ids=FEW.keys())


@pytest.mark.parametrize("groups", GROUPS, ids=lambda pair: f"groups{pair[0]}-salient{pair[1]}")
def test_dequantize_is_the_definition(groups):
    cases = [case for case in every_combination() if (case.groups, case.salient_groups) == groups]
    assert len(cases) == 2 * 2 * len(KEEP)
    assert {(case.m, case.block) for case in cases} == set(SIZES)
    for case in cases:
        got = DEQUANTIZE(*case.tensors(), *case.sizes())
        want, magnitude = case.dense()
        assert (got.dtype, got.shape) == (torch.float32, want.shape)
        # Scales are exact in float32; then at most 2 products, 2 sums and the copies in between: under 6 roundings.
        wrong = (got - want).abs() > 6 * EPS * magnitude
        assert not wrong.any(), (case, wrong.nonzero()[0].tolist())
        if case.mask is not None:
            assert (got[~case.mask] == 0).all()


def relative_rms(got: Tensor, want: Tensor, magnitude: Tensor | None = None) -> float:
    """Error over ``want``, or over the summed magnitudes of its terms where these may cancel."""
    size = want if magnitude is None else magnitude
    return float((got.double() - want).square().mean().sqrt() / size.double().square().mean().sqrt())


# float32: EPS per step; over 130 terms of random sign the error grows like their root, 12.
# Half precision: the result is rounded once, by 2^-12 to 2^-11 of it at most in float16, 2^-9 to 2^-8 in bfloat16; the
# root mean square of that lies well below the upper end, which leaves room for sums that are not kept in float32.
TOLERANCE = {torch.float32: 20 * EPS, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@few
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_linear_is_a_dense_product(case, dtype, with_bias):
    x = torch.randn(7, case.m).to(dtype)
    bias = torch.randn(case.n) if with_bias else None
    got = LINEAR(*case.linear_args(x, bias))
    # The definition rounds the weight once to the dtype of x, and the bias too.
    want = x.double() @ case.dense()[0].float().to(dtype).double().T
    if bias is not None:
        want += bias.to(dtype).double()
    assert (got.dtype, got.shape) == (dtype, (7, case.n))
    assert relative_rms(got, want) < TOLERANCE[dtype]


@few
def test_linear_of_any_leading_shape(case):
    args = case.linear_args(torch.randn(2, 3, case.m), torch.randn(case.n))
    whole = LINEAR(*args)
    assert whole.shape == (2, 3, case.n)
    for i, j in itertools.product(range(2), range(3)):
        single = LINEAR(args[0][i, j], *args[1:])
        assert single.shape == (case.n,)
        # the matrix library may sum one row in another order than six: a few float32 roundings
        torch.testing.assert_close(single, whole[i, j], rtol=0, atol=float(20 * EPS * whole.abs().max()))


@few
def test_linear_of_non_contiguous_input(case):
    x = torch.randn(case.m, 6).T
    spread = torch.randn(6, 2 * case.m)[:, ::2]
    for strided in (x, spread, x[:1].expand(6, case.m)):
        assert not strided.is_contiguous()
        got, want = LINEAR(*case.linear_args(strided, None)), LINEAR(*case.linear_args(strided.contiguous(), None))
        torch.testing.assert_close(got, want, rtol=0, atol=float(20 * EPS * want.abs().max()))


@few
@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_linear_of_nothing(case, leading):
    x = torch.empty(*leading, case.m, requires_grad=True)
    out = LINEAR(*case.linear_args(x, torch.ones(case.n)))
    assert out.shape == (*leading, case.n)
    out.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_inputs_are_named(device):
    case = FEW["plain"]
    tensors = tuple(tensor if tensor is None else tensor.to(device) for tensor in case.tensors())

    def run(x, bias=None):
        return LINEAR(x.to(device), *tensors, None if bias is None else bias.to(device), *case.sizes())

    assert run(torch.zeros(2, 40)).device.type == device  # the calls below fail for the stated reason only
    with pytest.raises(RuntimeError, match=r"x must be floating point, got torch\.int64"):
        run(torch.zeros(2, 40, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="x has 39 columns, the weight has 40"):
        run(torch.zeros(2, 39))
    with pytest.raises(RuntimeError, match="at least one dimension"):
        run(torch.tensor(1.0))
    for shape in [(4,), (1, 5), (1,)]:
        with pytest.raises(RuntimeError, match=r"bias has shape .*, expected \(5,\)"):
            run(torch.zeros(2, 40), torch.zeros(shape))


def test_input_on_another_device_is_named():
    case = FEW["plain"]
    with pytest.raises(RuntimeError, match="x is on meta, the weight on cpu"):
        LINEAR(*case.linear_args(torch.zeros(2, 40, device="meta"), None))


@few
def test_opcheck(case):
    torch.library.opcheck(DEQUANTIZE, (*case.tensors(), *case.sizes()))
    x, bias = torch.randn(3, case.m, requires_grad=True), torch.randn(case.n, requires_grad=True)
    torch.library.opcheck(LINEAR, case.linear_args(x, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_opcheck_half_precision(dtype):
    case = FEW["four groups"]
    x = torch.randn(2, 3, case.m).to(dtype).requires_grad_()
    torch.library.opcheck(LINEAR, case.linear_args(x, None))


@few
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)], ids=str)
def test_gradient_is_that_of_a_dense_layer(case, leading):
    x, bias = torch.randn(*leading, case.m), torch.randn(case.n)
    out_grad = torch.randn(*leading, case.n)
    grads = []
    for run in (
        lambda x, bias: LINEAR(*case.linear_args(x, bias)),
        lambda x, bias: torch.nn.functional.linear(x.double(), case.dense()[0], bias.double()),
    ):
        leaves = x.clone().requires_grad_(), bias.clone().requires_grad_()
        out = run(*leaves)
        out.backward(out_grad.to(out.dtype))
        grads.append([leaf.grad for leaf in leaves])
    magnitudes = (out_grad.abs().double() @ case.dense()[0].abs(), out_grad.abs().reshape(-1, case.n).sum(0))
    for got, want, magnitude in zip(*grads, magnitudes, strict=True):
        assert got.dtype == torch.float32
        # sums of at most 6 terms: weight, product, up to 5 sums and the reference's own rounding, under 10 roundings
        assert relative_rms(got, want.double(), magnitude) < 10 * EPS


def test_gradient_of_the_bias_alone_and_of_nothing():
    case = FEW["four groups"]
    bias = torch.randn(case.n, requires_grad=True)
    LINEAR(*case.linear_args(torch.randn(6, case.m), bias)).sum().backward()
    assert torch.equal(bias.grad, torch.full((case.n,), 6.0))
    assert not LINEAR(*case.linear_args(torch.randn(6, case.m), bias.detach())).requires_grad


def test_gradient_keeps_the_dtype_of_the_input():
    case = FEW["pruned"]
    x = torch.randn(4, case.m).bfloat16().requires_grad_()
    bias = torch.randn(case.n, requires_grad=True)
    LINEAR(*case.linear_args(x, bias)).sum().backward()
    assert (x.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@few
def test_not_a_number_reaches_its_own_row_only(case, poison):
    x = torch.randn(3, case.m)
    clean = LINEAR(*case.linear_args(x, None))
    x[1, case.m - 1] = poison
    got = LINEAR(*case.linear_args(x, None))
    assert not torch.isfinite(got[1]).any()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_not_a_number_in_a_pruned_column_is_not_hidden(poison):
    """A dense product turns 0 * NaN into NaN; a kernel that skips pruned weights must not differ in silence."""
    case = FEW["pruned"]
    column = int((~case.mask).any(0).nonzero()[0])
    x = torch.randn(2, case.m)
    x[0, column] = poison
    assert not torch.isfinite(LINEAR(*case.linear_args(x, None))[0]).any()


@pytest.mark.parametrize("kept", [(0, 0, 40, 40), (2, 4, 40, 20), (2, 4, 42, 21), (3, 5, 72, 44), (1, 8, 9, 2)])
def test_kept_columns(kept):
    keep_n, keep_m, columns, want = kept
    assert reference.kept_columns(columns, keep_n, keep_m) == want


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, out.numel() if isinstance(out, Tensor) else 0)
        return out


@pytest.mark.parametrize("block", [32, 100])
def test_work_space_is_of_the_size_of_the_weight(block):
    assert _work_space(block) <= 4 * 128  # 4 rows; planes are padded to 128 columns, nothing else needs more


def test_work_space_does_not_grow_with_the_block_size():
    assert _work_space(2**16) <= 4 * 128


def _work_space(block):
    case = Case(4, 72, groups=2, shift=True, block=block)
    with LargestTensor() as largest:
        reference.binary_dequantize(*case.tensors(), *case.sizes())
    return largest.numel


# Compilers -------------------------------------------------------------------------------------------------------


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = Case(40, 72, groups=2, salient_groups=2, columns=True).module(torch.randn(40))
        self.down = Case(72, 40, groups=4, salient_groups=1, shift=True).module()

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def _compiled_matches_eager(backend):
    torch._dynamo.reset()
    module = TwoLayers()
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    for batch in (5, 3):
        x = torch.randn(batch, 72)
        results = []
        for run in (module, compiled):
            leaf = x.clone().requires_grad_()
            out = run(leaf)
            out.square().sum().backward()
            results.append((out.detach(), leaf.grad))
        for eager, other in zip(*results, strict=True):
            # same ops on the same numbers; only sums around them may be fused in another order
            assert relative_rms(other, eager.double()) < 20 * EPS


def test_compile_traces_without_a_break():
    _compiled_matches_eager("aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for the CPU")
def test_compile_with_the_default_backend():
    _compiled_matches_eager("inductor")


def test_export():
    module = TwoLayers().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(module, (torch.randn(5, 72),), dynamic_shapes=({0: batch},))
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert called.count("hf_lowbit.binary_linear.default") == 2  # kept as one op, not spelled out
    for rows in (5, 9):
        x = torch.randn(rows, 72)
        assert torch.equal(exported.module()(x), module(x))
