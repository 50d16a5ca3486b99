"""Microseconds of a compiled kernel on an H100 SXM, by arithmetic on its code and the sizes of its launch. A model, not
a measurement: it says what binds, and by how much one version should beat another.

Products   a tile takes its K steps and an epilogue, and tiles come in waves of as many programs as run at a time. A K
           step takes the longest of
               tensor cores   4096 FLOP a cycle and SM in bf16, twice that in fp8
               L2 cache       the operands' tiles at its bandwidth to the SMs; Triton shares none between SMs
               issue          the loop's instructions, warp by warp, at four a cycle and SM
           The epilogue's instructions are issued while nothing else happens, unless two programs share an SM; then the
           products of one hide the epilogue of the other, up to its length
           No launch is faster than its operands and results come through HBM, each once
           A tile first waits for FILL, unless the loop is flattened, so that loads of the next one run meanwhile
Attention  a program goes through tiles of queries and keys, of which it visits those with visible pairs. A step takes
               tensor cores   as above; L2 cache: one tile of two operands
               softmax        the issue of its instructions without those of edges, or exponentials, 16 a cycle and SM
           one after the other, unless several programs share an SM: then one multiplies while another exponentiates.
           Of that speed, ATTENTION
Passes     the longest of memory (each tensor of the launch once, what changes in place twice, at a share of HBM that
           copies reach) and issue (all instructions of all warps at ISSUE of the peak rate)
Library    torch's products, and its passes that look for a largest size, by the classes of bench/projection
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from bench.projection.machine import CLASSES, FP32_FLOPS, HBM, SMS, product_fit
from kernels.gemm import Tiling, modelled_reads

CLOCK = 1.755e9  # Hz under load, of 1.98e9
# FLOP of an SM in a cycle, by the size of an operand's element: the nominal peaks at 1.83 GHz
TENSOR = {2: 4096, 1: 8192, 4: 256}  # fp32 in CUDA cores
L2 = 7e12 / SMS / CLOCK  # bytes a cycle to an SM: the upper end of what microbenchmarks find, 5.5 to 7 TB/s
MEMORY = 0.92  # of HBM's peak: what the best copies reach, an assumption like the next two
ISSUE = 0.8  # of four instructions a cycle: dependences leave slots empty
EXPONENTIALS = 16  # of an SM in a cycle
# of the speed that this arithmetic gives attention: Triton's own forward, causal, 16k tokens, 128 channels, is
# published with 395 TFLOP/s [FA3's paper], and tiles and instructions like ours say 556. Waiting is not modelled
ATTENTION = 0.71
FILL = 800  # cycles from a tile's first load to its first product: a way to L2 and back, and the first step
# what a launch changes in place is read and written
IN_PLACE = ("p_ptr", "low_ptr", "m_ptr", "v_ptr", "buf_ptr", "second_ptr")


LIBRARY = "mm"  # stands for a product of torch, or a pass of it, among an op's launches


class Prediction(NamedTuple):
    us: float
    bound: str  # tensor cores, L2, issue, memory, library


def predict(launch: Mapping[str, Any]) -> Prediction:
    """Of one launch, by its facts out of bench/aot.py."""
    if launch["kernel"] == LIBRARY:
        return _library(launch)
    if launch["kernel"].startswith("_attention_"):
        return _attention(launch)
    cut = tiles(launch)
    return _tiles(launch, cut) if cut else _pass(launch)


def _library(launch: Mapping[str, Any]) -> Prediction:
    if "product" not in launch:
        kind = CLASSES["compiled pass"]
        return Prediction(1e6 * launch["bytes"] / (kind.peak * kind.efficiency), "library")
    batch, M, N, K, itemsize = launch["product"]
    kind = CLASSES["fp8 product" if itemsize == 1 else "bf16 product"]
    rate = kind.peak * kind.efficiency * product_fit(batch, M, N, K, itemsize)
    seconds = 2 * batch * M * N * K / (rate if itemsize < 4 else FP32_FLOPS * 0.8)
    nbytes = batch * (itemsize * (M + N) * K + 2 * M * N)
    return Prediction(1e6 * max(seconds, nbytes / (MEMORY * HBM["H100"])), "library")


def _product(arguments: Mapping[str, int]) -> tuple[int, int, int, int, bool] | None:
    """Batch, M, N, K of the product that a launch computes, and whether only one triangle of it."""
    if not {"M", "N", "BLOCK_K"} <= arguments.keys():
        return None
    if "L" in arguments:  # Polar Express: K matrices
        return arguments["K"], arguments["M"], arguments["N"], arguments["L"], bool(arguments["SYMMETRIC"])
    return 1, arguments["M"], arguments["N"], arguments["K"], False


class Tiles(NamedTuple):
    """How a product is cut: tiles, waves of programs that take them, and what both levels of memory give to it."""

    tiles: int
    waves: int
    l2_bytes: int  # to the SMs
    hbm_bytes: int | None  # of operands, by the order of tiles; None: an order of its own


def tiles(launch: Mapping[str, Any]) -> Tiles | None:
    """None for what is no product."""
    sizes = _product(launch.get("arguments", {}))
    if sizes is None:
        return None
    (batch, M, N, K, symmetric), a = sizes, launch["arguments"]
    down, across = math.ceil(M / a["BLOCK_M"]), math.ceil(N / a["BLOCK_N"])
    count = batch * (down * (down + 1) // 2 if symmetric else down * across)
    tile = (a["BLOCK_M"], a["BLOCK_N"])
    hbm = None
    if "group" in a:
        order = Tiling(M, N, K, tile, launch["programs"], launch["itemsize"], 2)
        hbm = modelled_reads(order, a["group"])
    return Tiles(count, math.ceil(count / launch["programs"]), count * sum(tile) * K * launch["itemsize"], hbm)


def _tiles(launch: Mapping[str, Any], cut: Tiles) -> Prediction:
    a, warps, itemsize = launch["arguments"], launch["num_warps"], launch["itemsize"]
    (_, _, _, K, _), (height, width, step) = _product(a), (a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_K"])
    per_sm = math.ceil(launch["programs"] / SMS)
    flat = launch["flat"]
    # cycles of a K step of one program that has the SM to itself
    each = {
        "tensor cores": 2 * height * width * step / TENSOR[itemsize],
        "L2": (height + width) * step * itemsize / L2,
        "issue": (launch["loop"] - flat * launch["epilogue"]) * warps / 4,
    }
    products = math.ceil(K / step) * max(each.values())
    besides = launch["epilogue"] * warps / 4 + (0 if flat else FILL)
    tile = products + (besides if per_sm == 1 else max(0, besides - products))
    us = 1e6 * cut.waves * tile * per_sm / CLOCK
    memory = 1e6 * launch["bytes"] / (MEMORY * HBM["H100"])
    return Prediction(memory, "memory") if memory > us else Prediction(us, max(each, key=each.__getitem__))


def visited(seq_len: int, window: int, longest: int, tile: tuple[int, int], of_keys: bool) -> tuple[int, int]:
    """Programs of one head of a row, in documents of `longest` tokens, and the tiles (queries, keys) they all visit:
    each has queries and goes through their keys, or has keys and goes through the queries that see them."""
    queries, keys = tile
    begins = range(0, seq_len, keys if of_keys else queries)
    steps = 0
    for begin in begins:
        last = min(begin + begins.step, seq_len) - 1
        if of_keys:
            end = min(last + window, last // longest * longest + longest - 1, seq_len - 1)
            steps += math.ceil((end + 1 - begin // queries * queries) / queries)
        else:
            start = max(begin - window, begin // longest * longest)
            steps += math.ceil((last + 1 - start // keys * keys) / keys)
    return len(begins), steps


def _attention(launch: Mapping[str, Any]) -> Prediction:
    a, warps, itemsize = launch["arguments"], launch["num_warps"], launch["itemsize"]
    part, (M, N, D) = launch["kernel"].split("_")[2], (a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_D"])
    products = {"fwd": 2, "dq": 3, "dkv": 4}[part]
    longest = launch["shape"][6] if a["DOCUMENTS"] else a["T"]
    programs, steps = visited(a["T"], a["window"], longest, (M, N), part == "dkv")
    if part == "dkv":
        steps *= a["H"] // a["G"]
    steps *= launch["programs"] // programs
    tensor = 2 * M * N * D * products / TENSOR[itemsize]
    softmax = max((launch["loop"] - launch["epilogue"]) * warps / 4, M * N / EXPONENTIALS)
    l2 = 2 * (M if part == "dkv" else N) * D * itemsize / L2
    each = max(tensor, softmax, l2, (tensor + softmax) / launch["ctas"])
    besides = (FILL + (launch["length"] - launch["loop"]) * warps / 4) / launch["ctas"]
    us = 1e6 * (steps * each + launch["programs"] * besides) / SMS / CLOCK / ATTENTION
    memory = 1e6 * launch["bytes"] / (MEMORY * HBM["H100"])
    bound = "L2" if each == l2 else "tensor cores" if tensor >= softmax else "issue"
    return Prediction(memory, "memory") if memory > us else Prediction(us, bound)


def _pass(launch: Mapping[str, Any]) -> Prediction:
    memory = launch["bytes"] / (MEMORY * HBM["H100"])
    # a loop is run as often as its tensor has blocks; of the code once
    arguments = launch["arguments"]
    trips = arguments.get("STEPS", 1)
    if "columns" in arguments:
        trips = math.ceil(arguments["columns"] / arguments["BLOCK"])
    if {"chunk", "BLOCK_N"} <= arguments.keys():  # slots of a part of a KV cache
        trips = math.ceil(arguments["chunk"] / arguments["BLOCK_N"])
    instructions = (launch["length"] + (trips - 1) * launch["loop"]) * launch["num_warps"] * launch["programs"]
    issue = instructions / (4 * ISSUE * SMS * CLOCK)
    return Prediction(1e6 * max(memory, issue), "memory" if memory >= issue else "issue")


def traffic(arguments: Mapping[str, Any]) -> int:
    """Bytes of the tensors of a launch, by name, those that change in place twice."""
    total = 0
    for name, t in arguments.items():
        t = getattr(t, "base", t)  # of a descriptor
        if isinstance(t, torch.Tensor):
            total += t.numel() * t.itemsize * (2 if name in IN_PLACE else 1)
    return total
