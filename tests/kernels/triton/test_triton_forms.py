"""What is derived from stored tensors for the kernels; plain torch, and without Triton."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch

from hf_lowbit.kernels import unpack_plane
from hf_lowbit.kernels.triton.forms import Derived, compute_form, padded_scale
from tests.kernels.triton.binary_cases import KINDS, make


@pytest.mark.parametrize("name", ["rtn-2:4", "arb-4:8", "everything"])
@pytest.mark.parametrize("m", [40, 130, 300])
def test_compute_form_puts_every_bit_at_its_column(name, m):
    case = make(KINDS[name], 5, m)
    sign, group, mask = case.parts[0], case.parts[2], case.parts[8]
    _, _, keep_n, keep_m = case.sizes
    wide_sign, wide_group = compute_form(sign, group, mask, m, keep_n, keep_m)
    keep = unpack_plane(mask, m)
    kept = int(keep[0].sum())
    pairs = [(sign, wide_sign), *([] if group is None else zip(group, wide_group, strict=True))]
    assert len(pairs) == 1 + (0 if group is None else len(group))
    for stored, wide in pairs:
        assert wide.shape == mask.shape
        bits, want = unpack_plane(wide, m), unpack_plane(stored, kept)
        assert not bits[~keep].any()
        for row in range(5):
            assert torch.equal(bits[row, keep[row]], want[row])


def test_padded_scale():
    scale = torch.rand(3, 130)
    padded = padded_scale(scale, torch.float16)
    assert (padded.shape, padded.dtype) == ((3, 256), torch.float16)
    assert torch.equal(padded[:, :130], scale.half())
    assert not padded[:, 130:].any()


def test_derived_results_are_kept_until_a_source_changes():
    derived, made = Derived(), []
    first, second = torch.zeros(3), torch.zeros(3)

    def get(key="sum"):
        return derived.get(key, (first, second), lambda: made.append(key) or first + second)

    assert get() is get()
    assert made == ["sum"]
    get("other")
    assert made == ["sum", "other"]
    second.add_(1)
    assert torch.equal(get(), torch.ones(3))
    first.data = torch.ones(3)  # what module.to() does: another address, the same version
    assert torch.equal(get(), torch.full((3,), 2.0))
    assert made == ["sum", "other", "sum", "sum"]


def test_derived_results_are_dropped_with_their_owner():
    derived = Derived()
    # as many columns as are stored, in the dtype that is stored: the result must not be the owner itself
    owners = [torch.rand(2, 256)]
    result = weakref.ref(derived.get("columns", tuple(owners), lambda: padded_scale(owners[0], torch.float32)))
    assert result() is not None
    owners.clear()
    gc.collect()
    assert result() is None


def test_nothing_is_kept_for_tensors_whose_changes_cannot_be_seen():
    derived = Derived()
    with torch.inference_mode():
        source = torch.zeros(3)
        assert torch.equal(derived.get("copy", (source,), source.clone), torch.zeros(3))
        source.add_(1)
        assert torch.equal(derived.get("copy", (source,), source.clone), torch.ones(3))


def test_the_package_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import hf_lowbit.kernels.tuning, hf_lowbit.kernels.triton, hf_lowbit.kernels.triton.forms\n"
        "try:\n    import hf_lowbit.kernels.triton.binary\nexcept ImportError:\n    print('needs it')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "needs it\n"


def test_importing_the_kernels_does_not_import_triton():
    code = "import sys, hf_lowbit.kernels; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_tuning_without_a_gpu_says_so(tmp_path):
    tune = pytest.importorskip("hf_lowbit.kernels.triton.tune")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for device in ("cuda", "cpu"):
        with pytest.raises(RuntimeError, match=r"tuning measures on a real device: .*(no GPU|on cpu)"):
            tune.tune(device, [(16, 128)], tmp_path / "settings.json")
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_nothing_is_supported():
    binary = pytest.importorskip("hf_lowbit.kernels.triton.binary")
    case = make(KINDS["rtn"], 5, 130)
    ok, reason = binary.supports(torch.randn(2, 130), *case.parts, None, *case.sizes)
    assert (ok, reason) == (False, "needs a CUDA or ROCm device, the weight is on cpu")
    with pytest.raises(NotImplementedError, match="needs a CUDA or ROCm device"):
        binary.binary_linear(torch.randn(2, 130), *case.parts, None, *case.sizes)
