"""Format ``binary``: parts survive packing bit by bit, sizes are honest, and nothing damaged passes ``validate``."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lowbit.formats import FORMATS, BinaryFormat, BinarySpec, register_format
from hf_lowbit.formats.binary import SCALE_DTYPES
from hf_lowbit.kernels import dispatch, unpack_plane

SIGNED = ("row_shift",)


def parts_of(spec: BinarySpec, seed: int = 0) -> dict[str, Tensor]:
    """Random unpacked parts that fit ``spec``; scales in float32, rounded to what the spec can hold."""
    random = torch.Generator().manual_seed(seed)
    n, m = spec.out_features, spec.in_features

    def bits(*shape):
        return torch.rand(shape, generator=random) < 0.5

    parts = {"sign": bits(n, m)}
    if spec.groups > 1:
        parts["code"] = torch.randint(spec.groups, (n, m), generator=random)
    if spec.salient:
        parts["salient"] = torch.randperm(m, generator=random)[: spec.salient].sort().values
        parts["sign2"] = bits(n, spec.salient)
        if spec.salient_groups > 1:
            parts["code"][:, parts["salient"]] %= spec.salient_groups
    if spec.keep_m:
        mask = torch.zeros((n, m), dtype=torch.bool)
        for row in mask:
            for start in range(0, m, spec.keep_m):
                width = min(spec.keep_m, m - start)
                kept = torch.randperm(width, generator=random)[: -(-spec.keep_n * width // spec.keep_m)]
                row[start + kept] = True
        parts["mask"] = mask
    for name, (shape, dtype) in BinaryFormat.shapes(spec).items():
        if dtype.is_floating_point:
            values = torch.rand(shape, generator=random) + 0.25
            parts[name] = (values * (torch.where(bits(*shape), 1, -1) if name in SIGNED else 1)).to(dtype).float()
    return parts


@st.composite
def specs(draw):
    m = draw(st.integers(1, 300))
    groups = draw(st.integers(1, 4))
    salient_groups = draw(st.integers(0, min(2, groups)))
    keep_m = draw(st.sampled_from([0, 0, 1, 4, 5, 8, 16]))
    spec = BinarySpec(
        out_features=draw(st.integers(1, 6)),
        in_features=m,
        block_size=draw(st.sampled_from([1, 32, 48, 128, 300, 512])),
        groups=groups,
        salient=draw(st.integers(1, m)) if salient_groups else 0,
        salient_groups=salient_groups,
        shift=draw(st.booleans()),
        col_scales=draw(st.booleans()),
        scale_dtype=draw(st.sampled_from(sorted(SCALE_DTYPES))),
        keep_n=draw(st.integers(1, keep_m)) if keep_m else 0,
        keep_m=keep_m,
    )
    assert spec.problems() == []
    return spec


FULL = BinarySpec(
    6, 72, block_size=32, groups=3, salient=5, salient_groups=2, shift=True, col_scales=True, scale_dtype="float32"
)
PRUNED = BinarySpec(8, 250, groups=2, keep_n=2, keep_m=4, scale_dtype="bfloat16")
PLAIN = BinarySpec(10, 130)


def packed(spec: BinarySpec = FULL, **changes: Tensor | None) -> BinaryFormat:
    """A sound format with some of its tensors replaced."""
    return dataclasses.replace(BinaryFormat.pack(spec, **parts_of(spec)), **changes)


# Packing ---------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(spec=specs(), seed=st.integers(0, 2**31))
def test_parts_survive_bit_by_bit(spec, seed):
    parts = parts_of(spec, seed)
    before = {name: tensor.clone() for name, tensor in parts.items()}
    form = BinaryFormat.pack(spec, **parts)
    assert all(torch.equal(parts[name], old) and parts[name].dtype == old.dtype for name, old in before.items())

    state = form.state()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == BinaryFormat.shapes(spec)
    assert all(tensor.is_contiguous() for tensor in state.values())

    keep = parts.get("mask", torch.ones_like(parts["sign"]))
    rows = spec.out_features
    assert torch.equal(unpack_plane(form.sign, spec.kept), parts["sign"][keep].view(rows, -1))
    if spec.keep_m:
        assert torch.equal(unpack_plane(form.mask, spec.in_features), keep)
    if spec.groups > 1:
        bits = unpack_plane(form.group, spec.kept).long()
        code = sum(bits[p] << p for p in range(len(bits)))
        assert torch.equal(code, parts["code"][keep].view(rows, -1))
    if spec.salient:
        assert torch.equal(form.salient.long(), parts["salient"])
        assert torch.equal(unpack_plane(form.sign2, spec.salient), parts["sign2"])
    for name in ("row_scale", "row_shift", "col_scale", "col_scale2"):
        if name in parts:
            assert torch.equal(getattr(form, name).float(), parts[name])


@settings(max_examples=40, deadline=None)
@given(spec=specs(), seed=st.integers(0, 2**31))
def test_from_state_is_the_same_weight(spec, seed):
    form = BinaryFormat.pack(spec, **parts_of(spec, seed))
    again = BinaryFormat.from_state({name: tensor.clone() for name, tensor in form.state().items()}, spec)
    again.validate("copy")
    dense = form.unpack()
    assert (dense.dtype, tuple(dense.shape)) == (torch.float32, (spec.out_features, spec.in_features))
    assert torch.equal(dense, again.unpack())
    assert again.nbytes == form.nbytes
    x = torch.eye(spec.in_features)
    assert torch.allclose(again.linear(x, None), dense.T, rtol=1e-5, atol=1e-6)
    with dispatch.forced("reference"):
        assert torch.equal(again.linear(x, None), dense.T)  # products with 0 and 1 are exact


def test_from_state_copies_nothing():
    form = packed()
    again = BinaryFormat.from_state(form.state(), form.spec)
    assert all(tensor is form.state()[name] for name, tensor in again.state().items())


def test_simplest_weight_by_hand():
    """sign(w) times one scale per row and block."""
    sign = torch.tensor([[True, False, True], [False, False, True]])
    row_scale = torch.tensor([[[0.5, 2.0], [1.0, 3.0]]])  # blocks of two columns: rows 0 and 1 in each
    form = BinaryFormat.pack(BinarySpec(2, 3, block_size=2), sign=sign, row_scale=row_scale)
    assert form.unpack().tolist() == [[0.5, -0.5, 1.0], [-2.0, -2.0, 3.0]]


def test_pruned_signs_do_not_matter():
    parts = parts_of(PRUNED)
    flipped = {**parts, "sign": parts["sign"] ^ ~parts["mask"]}
    first, second = (BinaryFormat.pack(PRUNED, **p) for p in (parts, flipped))
    assert all(torch.equal(tensor, second.state()[name]) for name, tensor in first.state().items())
    assert ((first.unpack() != 0) == parts["mask"]).all()


def test_scales_are_rounded_to_the_dtype_of_the_spec():
    spec = BinarySpec(1, 4, scale_dtype="bfloat16")
    form = BinaryFormat.pack(spec, sign=torch.ones(1, 4, dtype=torch.bool), row_scale=torch.full((1, 1, 1), 1.001))
    assert form.row_scale.dtype == torch.bfloat16
    assert float(form.row_scale) == 1.0


def test_a_scale_beyond_the_dtype_is_refused():
    parts = parts_of(PLAIN)
    parts["row_scale"][0, 1, 3] = 7e4  # float16 ends at 65504
    with pytest.raises(ValueError, match="row_scale holds NaN or infinity"):
        BinaryFormat.pack(PLAIN, **parts)


@pytest.mark.parametrize("missing", ["code", "row_shift", "col_scale", "salient", "sign2", "col_scale2"])
def test_a_missing_part_is_named(missing):
    parts = parts_of(FULL)
    del parts[missing]
    with pytest.raises(ValueError, match=missing):
        BinaryFormat.pack(FULL, **parts)


def test_parts_of_another_spec_are_refused():
    with pytest.raises(ValueError, match="row_shift is not part of this spec"):
        BinaryFormat.pack(PLAIN, **parts_of(PLAIN), row_shift=torch.zeros(1, 2, 10))
    with pytest.raises(ValueError, match="row_scale is"):
        BinaryFormat.pack(PLAIN, **{**parts_of(PLAIN), "row_scale": torch.ones(1, 1, 10)})


@pytest.mark.parametrize("name", ["sign", "code", "sign2"])
def test_a_part_with_too_few_columns_is_refused(name):
    parts = parts_of(FULL)
    with pytest.raises(ValueError, match=name):
        BinaryFormat.pack(FULL, **{**parts, name: parts[name][:, :-1]})


def test_a_code_beyond_the_groups_is_refused():
    spec = BinarySpec(2, 40, groups=2)
    parts = parts_of(spec)
    parts["code"][0, 0] = 2
    with pytest.raises(ValueError, match="code"):
        BinaryFormat.pack(spec, **parts)


def test_an_index_beyond_32_bits_is_refused():
    parts = parts_of(FULL)
    parts["salient"][-1] += 2**32
    with pytest.raises(ValueError, match="salient"):
        BinaryFormat.pack(FULL, **parts)


def test_a_mask_that_keeps_too_much_is_refused():
    parts = parts_of(PRUNED)
    with pytest.raises(ValueError, match="mask"):
        BinaryFormat.pack(PRUNED, **{**parts, "mask": torch.ones_like(parts["mask"])})


# Shapes and sizes ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(spec=specs())
def test_empty_on_meta_has_the_shapes_and_the_size(spec):
    form = BinaryFormat.empty(spec)
    assert {name: (tuple(t.shape), t.dtype) for name, t in form.state().items()} == BinaryFormat.shapes(spec)
    assert {tensor.device.type for tensor in form.state().values()} == {"meta"}
    real = BinaryFormat.pack(spec, **parts_of(spec))
    assert (form.nbytes, form.bits_per_weight) == (real.nbytes, real.bits_per_weight)
    assert form.nbytes == sum(len(bytes(t.contiguous().view(torch.uint8).numpy())) for t in real.state().values())
    assert form.unpack().device.type == "meta"


def test_sizes_by_hand():
    # 10 rows of 130 bits take 2 x 16 bytes each; 2 blocks of float16 scales.
    assert BinaryFormat.empty(PLAIN).nbytes == 10 * 32 + 2 * 10 * 2
    assert BinaryFormat.empty(PLAIN).bits_per_weight == pytest.approx(8 * 360 / 1300)

    # sign, 2 group planes, 7 scales and 5 shifts of 3 blocks, 3 column scales, indices, sign2, 2 second column scales
    by_hand = 6 * 16 + 2 * 6 * 16 + 7 * 3 * 6 * 4 + 5 * 3 * 6 * 4 + 3 * 72 * 4 + 5 * 4 + 6 * 16 + 2 * 5 * 4
    assert BinaryFormat.empty(FULL).nbytes == by_hand == 2172

    # 2:4 at full width: half a sign, a mask bit and a sixteenth-bit scale per 128 weights, as the memory table has it
    assert BinaryFormat.empty(BinarySpec(64, 4096, keep_n=2, keep_m=4)).bits_per_weight == 1.5 + 16 / 128
    # the plain weight of the layout's own table
    assert BinaryFormat.empty(BinarySpec(64, 4096)).bits_per_weight == 1.125
    # one row and one column cost a whole padded group
    assert BinaryFormat.empty(BinarySpec(1, 1)).bits_per_weight == 8 * (16 + 2)


def test_kept_and_blocks():
    spec = BinarySpec(1, 42, block_size=32, keep_n=2, keep_m=4)
    assert (spec.kept, spec.blocks) == (21, 2)
    assert BinarySpec(1, 128).blocks == 1


# Damage ----------------------------------------------------------------------------------------------------------


def refused(form: BinaryFormat, *parts: str) -> None:
    with pytest.raises(ValueError, match=r"^model\.layers\.3\.q_proj: ") as error:
        form.validate("model.layers.3.q_proj")
    for part in parts:
        assert part in str(error.value)


def flipped(tensor: Tensor, index: tuple[int, ...], bit: int) -> Tensor:
    out = tensor.clone()
    out[index] ^= 1 << bit
    return out


def replaced(tensor: Tensor, index: tuple[int, ...], value: float) -> Tensor:
    out = tensor.clone()
    out[index] = value
    return out


@pytest.mark.parametrize("spec", [FULL, PRUNED, PLAIN], ids=["full", "pruned", "plain"])
def test_a_sound_weight_passes(spec):
    packed(spec).validate("sound")


# 72 columns: column 72 is bit 4 of byte 8. Five salient columns: column 5 is bit 0 of byte 5.
@pytest.mark.parametrize(
    ("name", "index", "bit"),
    [("sign", (5, 8), 4), ("sign", (0, 15), 7), ("group", (1, 2, 8), 4), ("sign2", (3, 5), 0)],
)
def test_padding_bit(name, index, bit):
    refused(packed(**{name: flipped(getattr(packed(), name), index, bit)}), f"{name} has padding bits set")


def test_padding_bit_of_a_mask():
    # 250 columns: column 250 is bit 7 of byte 16 + 10; 125 kept signs: column 125 is bit 7 of byte 13
    form = packed(PRUNED)
    refused(packed(PRUNED, mask=flipped(form.mask, (0, 26), 7)), "mask has padding bits set")
    refused(packed(PRUNED, sign=flipped(form.sign, (0, 13), 7)), "sign has padding bits set")


@pytest.mark.parametrize(
    "indices",
    [[1, 2, 3, 4, 72], [1, 2, 3, 4, 2**31 - 1], [2, 1, 3, 4, 5], [1, 2, 2, 3, 4], [-1, 0, 1, 2, 3], [5, 4, 3, 2, 1]],
    ids=["one too high", "far too high", "out of order", "twice", "negative", "descending"],
)
def test_salient_columns(indices):
    bad = torch.tensor(indices, dtype=torch.int32)
    refused(packed(salient=bad), "salient must hold ascending column indices below 72")


def test_first_and_last_column_may_be_salient():
    spec = BinarySpec(2, 72, groups=2, salient=2, salient_groups=1)
    packed(spec, salient=torch.tensor([0, 71], dtype=torch.int32)).validate("edges")


def test_one_mask_bit_too_many():
    form = packed(PRUNED)
    bits = unpack_plane(form.mask, 250)
    column = int((~bits[4]).nonzero()[0])
    refused(packed(PRUNED, mask=flipped(form.mask, (4, column % 16), column // 16)), "mask does not keep 2 of every 4")


def test_a_mask_with_the_right_total_but_uneven_groups():
    form = packed(PRUNED)
    row = form.mask[3].clone()
    bits = unpack_plane(row, 250)
    take, give = int(bits[:4].nonzero()[0]), 4 + int((~bits[4:8]).nonzero()[0])
    for column in (take, give):
        row[column % 16] ^= 1 << column // 16
    assert unpack_plane(row, 250).sum() == PRUNED.kept
    mask = form.mask.clone()
    mask[3] = row
    refused(packed(PRUNED, mask=mask), "mask does not keep 2 of every 4")


def test_a_mask_whose_short_last_group_is_wrong():
    """250 = 62 x 4 + 2: the last two columns keep one."""
    form = packed(PRUNED)
    last = unpack_plane(form.mask, 250)[0, 248:]
    assert last.sum() == 1
    column = 248 + int((~last).nonzero()[0])
    bad = flipped(form.mask, (0, 16 + (column - 128) % 16), (column - 128) // 16)
    refused(packed(PRUNED, mask=bad), "mask does not keep 2 of every 4")


def test_code_without_a_scale():
    group = packed().group.clone()
    assert not (group[0, 0, 0] & group[1, 0, 0] & 1)
    group[:, 0, 0] |= 1
    refused(packed(group=group), "group holds code 3")


def test_four_groups_have_a_code_3():
    spec = BinarySpec(2, 40, groups=4)
    form = packed(spec)
    assert (form.group[0] & form.group[1]).any()
    form.validate("four groups")


def test_salient_code_without_a_scale():
    """With two salient groups, a salient column of code 2 would read the scale of a plain group."""
    form = packed()
    column = int(form.salient[0])
    group = form.group.clone()
    group[0, 0, column % 16] &= ~(1 << column // 16)
    group[1, 0, column % 16] |= 1 << column // 16
    refused(packed(group=group), "group")


@pytest.mark.parametrize("name", ["row_scale", "row_shift", "col_scale", "col_scale2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scale_that_is_no_number(name, value):
    tensor = getattr(packed(), name)
    last = tuple(size - 1 for size in tensor.shape)
    refused(packed(**{name: replaced(tensor, last, value)}), f"{name} holds NaN or infinity")


@pytest.mark.parametrize("name", ["row_scale", "col_scale", "col_scale2"])
def test_negative_scale(name):
    tensor = getattr(packed(), name)
    last = tuple(size - 1 for size in tensor.shape)
    refused(packed(**{name: replaced(tensor, last, -0.5)}), f"{name} holds a negative scale")


def test_zero_scale_and_negative_shift_are_sound():
    form = packed()
    packed(row_scale=torch.zeros_like(form.row_scale), row_shift=-form.row_shift.abs()).validate("degenerate")


@pytest.mark.parametrize("name", BinaryFormat.tensor_names)
def test_wrong_shape(name):
    form = packed(dataclasses.replace(FULL, keep_n=2, keep_m=4))
    tensor = getattr(form, name)
    refused(dataclasses.replace(form, **{name: tensor[..., :-1]}), f"{name} is", str(tuple(tensor.shape)))
    refused(dataclasses.replace(form, **{name: tensor.unsqueeze(0)}), f"{name} is")


@pytest.mark.parametrize("name", BinaryFormat.tensor_names)
def test_wrong_dtype(name):
    form = packed(dataclasses.replace(FULL, keep_n=2, keep_m=4))
    tensor = getattr(form, name)
    other = {torch.uint8: torch.int8, torch.int32: torch.int64, torch.float32: torch.float16}[tensor.dtype]
    refused(dataclasses.replace(form, **{name: tensor.to(other)}), f"{name} is {other}", f"expected {tensor.dtype}")


@pytest.mark.parametrize("name", BinaryFormat.tensor_names)
def test_missing_tensor(name):
    form = packed(dataclasses.replace(FULL, keep_n=2, keep_m=4))
    refused(dataclasses.replace(form, **{name: None}), f"{name} is missing")


@pytest.mark.parametrize("name", [name for name in BinaryFormat.tensor_names if name not in ("sign", "row_scale")])
def test_extra_tensor(name):
    extra = getattr(packed(dataclasses.replace(FULL, keep_n=2, keep_m=4)), name)
    refused(packed(PLAIN, **{name: extra}), f"{name} is not part of this spec")


def test_everything_wrong_is_named_at_once():
    form = packed()
    bad = dataclasses.replace(form, sign=form.sign[:1], salient=form.salient.long(), sign2=None, mask=form.sign)
    refused(bad, "sign is torch.uint8 (1, 16)", "salient is torch.int64", "sign2 is missing", "mask is not part")
    worse = packed(
        sign=flipped(form.sign, (0, 15), 7),
        salient=form.salient.flip(0),
        row_scale=-form.row_scale,
        col_scale=form.col_scale * float("nan"),
    )
    refused(worse, "sign has padding", "salient must", "row_scale holds a negative", "col_scale holds NaN")


def test_bad_spec_is_found_before_the_tensors():
    refused(dataclasses.replace(packed(PLAIN), spec=BinarySpec(10, 130, groups=9)), "groups must be")


# Spec ------------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(spec=specs())
def test_spec_survives_json(spec):
    assert BinarySpec.from_json(json.loads(json.dumps(spec.to_json())), "here") == spec


def test_spec_writes_what_differs_from_the_defaults():
    assert PLAIN.to_json() == {"out_features": 10, "in_features": 130}


GOOD = {"out_features": 6, "in_features": 72, "groups": 3, "salient": 5, "salient_groups": 2, "keep_n": 2, "keep_m": 4}


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({"colour": 1, "grups": 2}, ["unknown key 'colour'", "unknown key 'grups'"]),
        ({"groups": 5, "salient": 73, "keep_n": -1}, ["groups must", "from 0 to 72, got 73", "keep_n must"]),
        ({"groups": True, "salient": False}, ["groups must be an integer from 1 to 4, got True", "salient must"]),
        ({"groups": 2.0, "block_size": "128"}, ["groups must be an integer from 1 to 4, got 2.0", "got '128'"]),
        ({"block_size": 0, "keep_m": 17}, ["block_size must", "keep_m must"]),
        ({"block_size": 2**24 + 1}, ["block_size must be an integer from 1 to 16777216"]),
        ({"groups": None, "shift": None}, ["groups must", "shift must be true or false, got None"]),
        ({"shift": 1, "col_scales": "yes"}, ["shift must be true or false, got 1", "col_scales must"]),
        ({"scale_dtype": "float64"}, ["scale_dtype must be one of float16, bfloat16, float32, got 'float64'"]),
        ({"scale_dtype": ["float16"]}, ["scale_dtype must"]),
        ({"salient": 0}, ["salient_groups must be 0 exactly"]),
        ({"salient_groups": 0}, ["salient_groups must be 0 exactly"]),
        ({"groups": 1}, ["salient_groups must not exceed groups"]),
        ({"keep_n": 5}, ["keep_n:keep_m must", "5:4"]),
        ({"keep_n": 0}, ["keep_n:keep_m must", "0:4"]),
        ({"keep_m": 0, "salient": 0}, ["keep_n:keep_m must", "salient_groups must"]),
        ({"out_features": 0, "in_features": -3}, ["out_features must", "got 0", "in_features must", "got -3"]),
        ({"out_features": 10**30, "in_features": True}, ["out_features must", "in_features must", "got True"]),
        ({"out_features": "6"}, ["out_features must be an integer from 1 to 16777216, got '6'"]),
    ],
)
def test_bad_spec_names_everything(change, messages):
    assert BinarySpec.from_json(GOOD, "here").groups == 3
    with pytest.raises(ValueError, match=r"^model.q: bad format spec: ") as error:
        BinarySpec.from_json({**GOOD, **change}, "model.q")
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize("change", [{"out_features": 0, "groups": 9}, {"colour": 1, "groups": 9}])
def test_bad_spec_names_problems_of_every_kind(change):
    with pytest.raises(ValueError, match="bad format spec") as error:
        BinarySpec.from_json({**GOOD, **change}, "model.q")
    assert all(name in str(error.value) for name in change)


def test_missing_sizes_are_named():
    with pytest.raises(ValueError, match=r"unknown key 'x'; missing key 'out_features'; missing key 'in_features'"):
        BinarySpec.from_json({"x": 1}, "here")


@pytest.mark.parametrize("data", [None, [], "spec", 3])
def test_spec_must_be_an_object(data):
    with pytest.raises(ValueError, match="must be an object"):
        BinarySpec.from_json(data, "here")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(key=st.sampled_from([field.name for field in dataclasses.fields(BinarySpec)]), value=JSON)
def test_any_json_gives_a_spec_or_a_value_error(key, value):
    try:
        spec = BinarySpec.from_json({**GOOD, key: value}, "here")
    except ValueError:
        return
    assert getattr(spec, key) == value
    assert spec.problems() == []
    BinaryFormat.empty(spec)  # whatever passes has shapes


def test_formats_do_not_share_a_name():
    assert FORMATS["binary"] is BinaryFormat
    with pytest.raises(ValueError, match="'binary' is registered already"):
        register_format(type("Other", (BinaryFormat,), {}))
    assert FORMATS["binary"] is BinaryFormat
