"""The emulator's TMA: boxes, swizzles and zeros against slicing; what is reported, and what isn't encoded."""

import ctypes
import os
import shutil
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="the emulator is built with g++")
SOURCE = Path(__file__).parent / "simt" / "tensor_map.cu"


@pytest.fixture(scope="module")
def kernels():
    from hhattn.simt.runtime import build_cu

    return build_cu(SOURCE)


@pytest.fixture
def emulator():
    from hhattn.simt.runtime import runtime

    runtime().reset()
    yield runtime()
    runtime().reset()
    runtime().options()


def bring(kernels, emulator, x, box, at, swizzle=128, *, missing=0, wait=True, sizes=None, strides=None, seed=0):
    """(whether the map was encoded, the box) of an int16 tensor [a, b, c]; box and at count from the last dimension."""
    from hhattn.simt.runtime import READ_ONLY, WRITE_FIRST

    emulator.reset()
    emulator.options(seed=seed)
    out = torch.zeros(box[2], box[1], box[0], dtype=torch.int16)
    emulator.register(x, "x", READ_ONLY)
    emulator.register(out, "out", WRITE_FIRST)
    sizes = sizes or [x.shape[2], x.shape[1], x.shape[0]]
    strides = strides or [2 * x.stride(1), 2 * x.stride(0)]
    p = ctypes.c_void_p
    encoded = kernels.run_bring(
        p(x.data_ptr()), (ctypes.c_uint64 * 3)(*sizes), (ctypes.c_uint64 * 2)(*strides), (ctypes.c_uint32 * 3)(*box),
        swizzle, (ctypes.c_int * 3)(*at), missing, int(wait), p(out.data_ptr()),
    )  # fmt: skip
    return bool(encoded), out


def padded(x, box, at):
    """The box by slicing a tensor with zeros all around."""
    around = 300
    wide = torch.zeros([n + 2 * around for n in x.shape], dtype=x.dtype)
    wide[around:-around, around:-around, around:-around] = x
    begin = [around + at[2], around + at[1], around + at[0]]
    return wide[tuple(slice(b, b + n) for b, n in zip(begin, (box[2], box[1], box[0]), strict=True))]


def tensor(*shape):
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.int16).reshape(shape)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("shape", "box", "at", "swizzle"),
    [
        ((3, 20, 64), (64, 16, 1), (0, 0, 1), 128),
        ((3, 20, 64), (64, 16, 1), (0, 10, 2), 128),  # rows beyond the end
        ((3, 20, 112), (64, 8, 2), (64, -3, 2), 128),  # columns, rows before the first, planes
        ((2, 9, 40), (64, 16, 1), (0, 0, 0), 128),
        ((2, 9, 36), (16, 4, 2), (24, 3, 0), 32),  # the last 16 bytes hold 4 elements that aren't there
        ((2, 9, 40), (32, 4, 2), (-8, 3, 0), 64),
        ((2, 9, 40), (8, 9, 2), (16, 0, 0), 16),
        ((2, 9, 40), (8, 3, 1), (48, 20, 7), 16),  # nothing of it is there
    ],
)
def test_boxes(kernels, emulator, shape, box, at, swizzle, seed):
    x = tensor(*shape[:2], (shape[2] + 7) // 8 * 8)[..., : shape[2]]
    encoded, out = bring(kernels, emulator, x, box, at, swizzle, seed=seed)
    assert encoded
    assert not emulator.reports()
    assert torch.equal(out, padded(x, box, at))


@pytest.mark.parametrize(
    ("kinds", "how"),
    [
        ({"deadlock", "divergence"}, {"missing": -16}),
        ({"async-pending", "uninitialized", "race"}, {"wait": False}),
        ({"global-oob"}, {"sizes": [64, 40, 3]}),  # a map that says more than there is
    ],
)
def test_faults_are_reported(kernels, emulator, kinds, how):
    bring(kernels, emulator, tensor(3, 20, 64), (64, 16, 1), (0, 10, 2), **how)
    found = {r.kind for r in emulator.reports()}
    assert found
    assert found <= kinds


@pytest.mark.parametrize(
    "how",
    [
        {"strides": [2 * 60, 2 * 1280]},  # no multiple of 16 bytes
        {"box": (128, 4, 1)},  # rows wider than the swizzle
        {"box": (4, 4, 1)},
        {"box": (64, 257, 1)},
        {"swizzle": 48},
        {"sizes": [64, 0, 3]},
    ],
)
def test_what_the_driver_refuses_is_refused(kernels, emulator, how):
    how = {"box": (64, 4, 1), "at": (0, 0, 0), **how}
    assert not bring(kernels, emulator, tensor(3, 20, 64), **how)[0]


def test_a_tensor_off_its_alignment_is_refused(kernels, emulator):
    assert not bring(kernels, emulator, tensor(3, 20, 64)[..., 4:], (32, 4, 1), (0, 0, 0))[0]
