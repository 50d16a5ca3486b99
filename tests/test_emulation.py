"""csrc/emulation.h and csrc/redline.h: what a GPU would do, and the mistakes that a GPU would not tell."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from csrc import build
from kernels import extension
from kernels.fp8 import E4M3, E4M3_MAX, E5M2, E5M2_MAX
from kernels.master import join_master, split_master
from kernels.op import Device
from tests.harness import ORDERS, edited_csrc, noticed, replaced
from tests.mutations import mutations

ALL_ORDERS = ("lowest first", *ORDERS)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or extension.needs_extension(Device.of(torch.device("cpu"))) is not None,
    reason="kernels are not emulated here",
)

KERNELS = r"""
#include "redline.h"

namespace {

constexpr int THREADS = 128;

// y is x backwards; BARRIER: between writing and reading
template <bool BARRIER>
__global__ void reversed(const float* x, float* y) {
    SHARED(float, tile, THREADS);
    tile[threadIdx.x] = x[threadIdx.x];
    if (BARRIER) __syncthreads();
    y[threadIdx.x] = tile[THREADS - 1 - threadIdx.x];
}

// y is x backwards twice, through the same memory; BARRIER: before it is used again
template <bool BARRIER>
__global__ void twice(const float* x, float* y) {
    DYNAMIC_SHARED(float, tile);
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    const float back = tile[THREADS - 1 - threadIdx.x];
    if (BARRIER) __syncthreads();
    tile[threadIdx.x] = back;
    __syncthreads();
    y[threadIdx.x] = tile[THREADS - 1 - threadIdx.x];
}

// lanes exchange through shared memory; BARRIER: a warp waits for itself
template <bool BARRIER>
__global__ void neighbours(const float* x, float* y) {
    SHARED(float, tile, THREADS);
    tile[threadIdx.x] = x[threadIdx.x];
    if (BARRIER) __syncwarp();
    y[threadIdx.x] = tile[threadIdx.x ^ 1];
}

__global__ void two_barriers(const float*, float*) {
    if (threadIdx.x < 64)
        __syncthreads();
    else
        __syncthreads();
}

__global__ void ends_early(const float*, float*) {
    if (threadIdx.x == 5) return;
    __syncthreads();
}

__global__ void half_a_warp(const float*, float* y) {
    if (threadIdx.x % 32 < 16) y[0] = __shfl_xor_sync(FULL_WARP, 1.0f, 8);
}

__global__ void half_a_mask(const float*, float* y) { y[0] = __shfl_xor_sync(0xffffu, 1.0f, 8); }

__global__ void uninitialised(const float*, float* y) {
    SHARED(float, tile, THREADS);
    DYNAMIC_SHARED(float, more);
    y[threadIdx.x] = threadIdx.x < 64 ? tile[threadIdx.x] : more[threadIdx.x];
}

__global__ void beyond_shared(const float*, float* y) {
    SHARED(float, tile, THREADS);
    tile[threadIdx.x + 1] = 0.0f;
    y[threadIdx.x] = tile[threadIdx.x];
}

__global__ void beyond_dynamic(const float*, float* y) {
    DYNAMIC_SHARED(float, tile);
    y[threadIdx.x] = tile[threadIdx.x + 1];
}

__global__ void beyond_global(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }

__global__ void sums(const float* x, float* y) {
    SHARED(float, scratch, 32);
    const float sum = block_reduce(x[threadIdx.x], scratch);
    const float most = block_reduce<Largest>(x[threadIdx.x], scratch);
    y[threadIdx.x] = sum + 2.0f * block_reduce(1.0f, scratch) + most;
}

__global__ void misaligned(const float* x, float* y) {
    float four[4];
    load(x + 1, four);
    y[threadIdx.x] = four[0];
}

__global__ void counted(const float*, float* y) { atomicAdd(y, 1.0f); }

__global__ void convert(const float* x, bf16* b, e4m3* four, e5m2* five) {
    const std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    b[i] = rounded<bf16>(x[i]);
    four[i] = rounded<e4m3>(x[i]);
    five[i] = rounded<e5m2>(x[i]);
}

__global__ void halves(const float* x, bf16* high, std::int16_t* low, float* back) {
    const std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    const Halves h = split_master(x[i]);
    high[i] = h.high;
    low[i] = h.low;
    back[i] = join_master(h.high, h.low);
}

struct Item {
    float* to;
    int n;
};

__global__ void count_blocks(const __grid_constant__ Table<Item, 3> table, float by) {
    const int item = table.item();
    table.items[item].to[blockIdx.x - table.first[item]] += by;
}

}  // namespace

void run(const std::string& name, Pointer x, Pointer y, int threads, int blocks) {
    const std::pair<const char*, void (*)(const float*, float*)> kernels[] = {
        {"reversed", reversed<true>}, {"reversed without barrier", reversed<false>}, {"twice", twice<true>},
        {"twice without barrier", twice<false>}, {"neighbours", neighbours<true>},
        {"neighbours without barrier", neighbours<false>}, {"two barriers", two_barriers}, {"ends early", ends_early},
        {"half a warp", half_a_warp}, {"half a mask", half_a_mask}, {"uninitialised", uninitialised},
        {"beyond shared", beyond_shared}, {"beyond dynamic", beyond_dynamic}, {"beyond global", beyond_global},
        {"sums", sums}, {"counted", counted}, {"misaligned", misaligned}};
    for (const auto& [known, kernel] : kernels)
        if (name == known)
            launch(kernel, blocks, threads, THREADS * sizeof(float), Where{}, reinterpret_cast<const float*>(x),
                   reinterpret_cast<float*>(y));
}

void run_convert(Pointer x, Pointer b, Pointer four, Pointer five, std::int64_t n) {
    launch(convert, static_cast<unsigned>(n / THREADS), THREADS, 0, Where{}, reinterpret_cast<const float*>(x),
           reinterpret_cast<bf16*>(b), reinterpret_cast<e4m3*>(four), reinterpret_cast<e5m2*>(five));
}

void run_halves(Pointer x, Pointer high, Pointer low, Pointer back, std::int64_t n) {
    launch(halves, static_cast<unsigned>(n / THREADS), THREADS, 0, Where{}, reinterpret_cast<const float*>(x),
           reinterpret_cast<bf16*>(high), reinterpret_cast<std::int16_t*>(low), reinterpret_cast<float*>(back));
}

void run_counts(const std::vector<std::pair<Pointer, int>>& tensors) {
    std::vector<Item> items;
    for (const auto& [to, n] : tensors) items.push_back({reinterpret_cast<float*>(to), n});
    launch_all(count_blocks, items, [](const Item& item) { return item.n; }, 32, 0, Where{}, 1.0f / 32);
}
"""

BINDINGS = r"""
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <cstdint>
using Pointer = std::uintptr_t;
void run(const std::string&, Pointer, Pointer, int, int);
void run_convert(Pointer, Pointer, Pointer, Pointer, std::int64_t);
void run_halves(Pointer, Pointer, Pointer, Pointer, std::int64_t);
void run_counts(const std::vector<std::pair<Pointer, int>>&);
namespace emulation { void set_order(const std::string&, std::uint64_t); }
PYBIND11_MODULE(REDLINE_MODULE, m) {
    m.def("run", &run);
    m.def("run_convert", &run_convert);
    m.def("run_halves", &run_halves);
    m.def("run_counts", &run_counts);
    m.def("set_order", &emulation::set_order);
}
"""


def write_sources(folder):
    folder.mkdir()
    for header in ("redline.h", "emulation.h"):
        shutil.copy(build.CSRC / header, folder)
    (folder / "kernels.cu").write_text(KERNELS)
    (folder / "bindings.cpp").write_text(BINDINGS)
    return folder


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    sources = write_sources(tmp_path_factory.mktemp("emulation") / "csrc")
    return build.load(build.build_emulated(extension.cache_folder(), sources=sources), "_emulated")


def run(module, name, order="lowest first", threads=128, blocks=1):
    x = torch.arange(1.0, threads + 1)
    y = torch.zeros(threads)
    module.set_order(order, 1)
    try:
        module.run(name, x.data_ptr(), y.data_ptr(), threads, blocks)
    finally:
        module.set_order("lowest first", 0)
    return x, y


@pytest.mark.parametrize("order", ALL_ORDERS)
def test_barriers_make_every_order_the_same(emulated, order):
    x, y = run(emulated, "reversed", order)
    assert torch.equal(y, x.flip(0))
    x, y = run(emulated, "twice", order)
    assert torch.equal(y, x)
    x, y = run(emulated, "neighbours", order)
    assert torch.equal(y, x.view(-1, 2).flip(1).view(-1))


@pytest.mark.parametrize("name", ["reversed", "twice", "neighbours"])
def test_some_order_shows_that_a_barrier_is_missing(emulated, name):
    want = run(emulated, name)[1]
    wrong = [not torch.equal(run(emulated, f"{name} without barrier", order)[1], want) for order in ALL_ORDERS]
    assert any(wrong)


@pytest.mark.parametrize("order", ALL_ORDERS)
@pytest.mark.parametrize(
    "name, says",
    [
        ("two barriers", r"block \(0, 0, 0\): a divergent barrier: thread 0 is at .*kernels.cu:\d+, thread 64 at"),
        ("ends early", r"thread \d+ waits at .*kernels.cu:\d+ for thread 5, which has ended"),
        ("half a warp", r"thread \d+ waits at .*kernels.cu:\d+ for thread \d+, which has ended"),
        ("half a mask", r"the mask of the shuffle at .*kernels.cu:\d+ is not the whole warp"),
        ("misaligned", r"an access at 4 bytes beyond a multiple of 16"),
    ],
)
def test_what_would_hang_or_be_undefined_is_an_error(emulated, name, says, order):
    with pytest.raises(RuntimeError, match=says):
        run(emulated, name, order)
    x, y = run(emulated, "reversed")  # and leaves nothing behind
    assert torch.equal(y, x.flip(0))


def test_shared_memory_begins_as_nan(emulated):
    assert run(emulated, "uninitialised")[1].isnan().all()
    assert run(emulated, "uninitialised", blocks=2)[1].isnan().all()


@pytest.mark.parametrize("threads", [32, 96, 512, 1024])
def test_reductions_over_every_number_of_warps(emulated, threads):
    results = [run(emulated, "sums", order, threads=threads) for order in ALL_ORDERS]
    for x, y in results:
        assert (y == x.sum() + 2 * threads + threads).all()


def test_every_block_runs(emulated):
    assert run(emulated, "counted", threads=32, blocks=70_000)[1][0] == 32 * 70_000


@pytest.mark.parametrize("threads, says", [(48, "48 threads a block; expected 32 to 1024"), (2048, "2048 threads")])
def test_launches_that_a_gpu_refuses(emulated, threads, says):
    with pytest.raises(ValueError, match=says):
        run(emulated, "counted", threads=threads)


def test_an_unknown_order_is_refused(emulated):
    with pytest.raises(ValueError, match="order is by name; expected lowest first"):
        emulated.set_order("by name", 0)


def floats():
    """Every bf16 number, what lies just beside and halfway to the next, and random bits."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    near = [high | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    noise = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    return torch.cat([*near, noise]).view(torch.float32)


def test_conversions_are_those_of_torch(emulated):
    x = floats()
    b = torch.empty_like(x, dtype=torch.bfloat16)
    four, five = torch.empty_like(x, dtype=E4M3), torch.empty_like(x, dtype=E5M2)
    emulated.run_convert(x.data_ptr(), b.data_ptr(), four.data_ptr(), five.data_ptr(), x.numel())
    nan = x.isnan()
    assert b.isnan().equal(nan) and torch.equal(b[~nan].view(torch.int16), x[~nan].bfloat16().view(torch.int16))
    for got, dtype, limit in ((four, E4M3, E4M3_MAX), (five, E5M2, E5M2_MAX)):
        want = x.clamp(-limit, limit).to(dtype)
        assert got.float().isnan().equal(nan)
        assert torch.equal(got[~nan].view(torch.uint8), want[~nan].view(torch.uint8))


def test_halves_of_a_master_are_those_of_torch(emulated):
    x = floats()
    high, low, back = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x, dtype=torch.int16), x.clone()
    emulated.run_halves(x.data_ptr(), high.data_ptr(), low.data_ptr(), back.data_ptr(), x.numel())
    want = split_master(x)
    assert torch.equal(high.view(torch.int16), want[0].view(torch.int16)) and torch.equal(low, want[1])
    assert torch.equal(back.view(torch.int32), x.view(torch.int32))
    assert torch.equal(join_master(*want).view(torch.int32), x.view(torch.int32))


def test_many_tensors_share_launches(emulated):
    """More than a table holds, some without a block."""
    counts = [1, 0, 3, 5, 2, 0, 0, 7, 1, 4, 0]
    tensors = [torch.zeros(n + 1) for n in counts]
    emulated.run_counts([(t.data_ptr(), n) for t, n in zip(tensors, counts)])
    for t, n in zip(tensors, counts):
        assert t.tolist() == [1.0] * n + [0.0]
    emulated.run_counts([(tensors[0].data_ptr(), 0)])  # nothing to launch
    assert tensors[0].tolist() == [1.0, 0.0]


# redline.h with bugs

MUTATIONS = {
    "no barrier before the parts are read": {"scratch[warp] = x;\n    __syncthreads();": "scratch[warp] = x;"},
    "no barrier before the parts are overwritten": {"Join::NOTHING;\n    __syncthreads();": "Join::NOTHING;"},
    "one warp alone is at a barrier": {
        "if (lane == 0) scratch[warp] = x;\n    __syncthreads();": "if (lane == 0) scratch[warp] = x;\n    if (warp) "
        "__syncthreads();"
    },
    "a shuffle has half a mask": {"__shfl_xor_sync(FULL_WARP": "__shfl_xor_sync(0xffffu"},
    "a part of a warp's sum is missing": {"lanes = 16;": "lanes = 8;"},
    "the last warp is left out": {"lane < warps ?": "lane < warps - 1 ?"},
    "bf16 is truncated": {"to[0].bits = emulation::to_bf16(a);": "to[0].bits = __float_as_uint(a) >> 16;"},
    "fp8 wraps around": {"emulation::to_fp8(a, 4, 3, 0x7e)": "emulation::to_fp8(a, 4, 3, 0xff)"},
    "the table's last item is lost": {"    flush();\n}": "}"},
    "items without blocks are counted": {"if (!more) continue;": ""},
    "a tie of a master goes to even": {"(bits + 0x8000u) >> 16": "(bits + 0x7fffu + (bits >> 16 & 1)) >> 16"},
}


@pytest.mark.parametrize(
    "name",
    mutations(
        MUTATIONS,
        always=[
            "no barrier before the parts are read",
            "no barrier before the parts are overwritten",
            "a shuffle has half a mask",
            "bf16 is truncated",
        ],
    ),
)
def test_a_broken_header_is_noticed(name, tmp_path):
    sources = write_sources(tmp_path / "csrc")
    header = sources / "redline.h"
    header.write_text(replaced(header.read_text(), MUTATIONS[name], header.name))
    broken = build.load(build.build_emulated(extension.cache_folder(), sources=sources), "_emulated")

    def check():
        test_conversions_are_those_of_torch(broken)
        test_halves_of_a_master_are_those_of_torch(broken)
        test_many_tensors_share_launches(broken)
        for threads in (32, 96, 1024):
            test_reductions_over_every_number_of_warps(broken, threads)

    assert noticed(check)


# sanitizers

SANITIZED = """
import sys
import numpy as np
from csrc import build
module = build.load({path!r}, "_emulated")
x, y = np.arange(128, dtype=np.float32), np.zeros(128, dtype=np.float32)
for order in {orders!r}:
    module.set_order(order, 0)
    module.run({name!r}, x.ctypes.data, y.ctypes.data, 128, 2)
print("ran")
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Runs one of KERNELS, built with AddressSanitizer, in a process of its own: its exit status and what it says."""
    sources = write_sources(tmp_path_factory.mktemp("sanitized") / "csrc")
    path = build.build_emulated(extension.cache_folder(), sources=sources, sanitize="address")

    def run(name):
        code = SANITIZED.format(path=str(path), orders=ALL_ORDERS, name=name)
        return python("-c", code)

    return run


def python(*arguments):
    """Python with AddressSanitizer loaded: exit status and output."""
    libraries = [_library(name) for name in ("libasan.so", "libstdc++.so")]
    if None in libraries:
        pytest.skip("the compiler has no AddressSanitizer")
    env = os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=build.CSRC.parent)
    return done.returncode, done.stdout + done.stderr


def _library(name):
    found = subprocess.run([build.host_compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout
    return found.strip() if Path(found.strip()).is_absolute() else None


@pytest.mark.parametrize("name", ["beyond shared", "beyond dynamic", "beyond global"])
def test_a_sanitizer_sees_what_lies_beyond(sanitized, name):
    status, text = sanitized(name)
    assert status and "AddressSanitizer: heap-buffer-overflow" in text and "kernels.cu" in text, text


def test_a_sanitizer_lets_pass_what_is_right(sanitized):
    for name in ("reversed", "twice", "sums"):
        status, text = sanitized(name)
        assert status == 0 and text == "ran\n", text


# the kernels of csrc/ under a sanitizer: tensors of their exact sizes, which nothing surrounds

EVERY_KERNEL = Path(__file__).with_name("sanitized_kernels.py")


@pytest.mark.parametrize("breaks", [None, "rms_norm.cu"])
def test_no_kernel_reaches_beyond_its_tensors(breaks, tmp_path):
    """A process for all: torch loads once. breaks: a file with a bound too far, for which it must fail."""
    sources = build.CSRC
    if breaks:
        sources = edited_csrc(breaks, {"if (row >= p.M) return;": "if (row > p.M) return;"}, tmp_path)
    path = build.build_emulated(extension.cache_folder(), sources=sources, sanitize="address")
    status, text = python(EVERY_KERNEL, path)
    if breaks:
        assert status and "AddressSanitizer" in text and breaks in text, text[-3000:]
    else:
        assert status == 0 and text.endswith("every kernel stayed within\n"), text[-3000:]
