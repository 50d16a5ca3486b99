"""Every Triton kernel at every size of the tracks compiles for sm_90: nothing spilled, within its shared memory,
wide loads.

`bench/aot.py` compiles in its own processes, once for all these tests and for `bench/static.py`, which keeps the facts.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import static
from bench.aot import ATOMICS, MAIN, environment, forms
from bench.kernel_model import LIBRARY, tiles
from kernels.op import interpreted
from kernels.ops import BY_NAME

MAX_SHARED = 232_448  # bytes a block may have on sm_90
ROOT = Path(__file__).resolve().parent.parent
COMPILED = static.compiled_ops()


@pytest.fixture(scope="module")
def kernels():
    return own(*static.facts(capabilities=[MAIN]))


def own(found, errors):
    """Kernels of this repository: without the products of libraries among an op's launches."""
    assert not errors, errors
    return [k for k in found if k["kernel"] != LIBRARY]


def describe(k):
    return f"{k['kernel']} {k['case']} {k['form']} {k['dtype']}: {k}"


def test_every_op_case_and_form_was_compiled(kernels):
    got = {(k["op"], k["case"], k["form"]) for k in kernels}
    ops = [BY_NAME[name] for name in COMPILED]
    want = {(op.name, case, form) for op in ops for case in op.cases for form in forms(op, MAIN)}
    assert got == {w for w in want if w[::2] != ("linear", "plain")}  # whose products are all torch's
    assert {k["kernel"] for k in kernels if k["op"] == "rms_norm"} == {"_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel"}


def test_nothing_spills_or_is_serialized(kernels):
    for k in kernels:
        assert k["spill_bytes"] == 0 and not k["serialized"] and "STL" not in k["instructions"], describe(k)


def test_shared_memory_fits(kernels):
    for k in kernels:
        assert k["shared_bytes"] <= MAX_SHARED, describe(k)


def test_rms_norm_moves_16_bytes_at_a_time(kernels):
    """Each tensor that a thread reads or writes goes in the fewest possible instructions: N / (lanes * 8) of them in
    bf16."""
    # forward reads, writes; backward
    tensors = {"plain": (1, 1, 2, 1), "add": (2, 2, 3, 1), "mix": (2, 2, 5, 2), "mix3": (3, 2, 6, 2)}
    for k in kernels:
        if k["op"] != "rms_norm" or k["dtype"] != "bfloat16" or k["form"] not in tensors:
            continue
        backward = "bwd" in k["kernel"]
        reads, writes = tensors[k["form"]][2 * backward : 2 * backward + 2]
        M, N = k["shape"]
        rows = max(1, 1024 // N) if N < 512 else 1
        per_tensor = -(-N * rows // (32 * 8 * k["num_warps"]))
        got = k["instructions"]
        assert (got["LDG.E.128"], got["STG.E.128"]) == (reads * per_tensor, writes * per_tensor), describe(k)


def test_rms_norm_writes_two_fp8_copies_in_one_pass(kernels):
    """A thread has 16 numbers of a chunk of its rows: 16 bytes of either copy. Beside them it writes h and, of the
    first chunk, the first channels; no y. Alone are a, b, scale and rstd. Programs of up to 8 warps share an SM."""
    reads = {"mix_fp8": 2, "mix3_fp8": 3}
    passes = [k for k in kernels if k["op"] == "rms_norm" and k["form"] in reads and "fwd" in k["kernel"]]
    assert len(passes) == 2 * (len(BY_NAME["rms_norm"].cases) + 1)
    for k in passes:
        got, chunks, width = k["instructions"], k["arguments"]["CHUNKS"], 2 if k["dtype"] == "bfloat16" else 4
        assert got["LDG.E.128"] == chunks * width * reads[k["form"]], describe(k)
        assert got["STG.E.128"] == chunks * (width + 2) + width * (k["form"] == "mix3_fp8"), describe(k)
        assert got["LDG"] - got["LDG.E.128"] == 2 * chunks + 1 and got["STG"] - got["STG.E.128"] == 1, describe(k)
        ctas = static.ctas_per_sm(90, k["registers"], k["num_warps"], k["shared_bytes"])
        assert ctas >= (2 if k["num_warps"] <= 8 else 1), describe(k)


def test_relu2_mlp_multiplies_in_tensor_cores_fed_by_bulk_copies(kernels):
    """One loop over K whose body is BLOCK_K / 16 warp-group products, tiles loaded and stored in bulk, none by
    threads."""
    of_mlp = [k for k in kernels if k["op"] == "relu2_mlp" and k["dtype"] == "bfloat16"]
    assert len(of_mlp) == 2 * len(BY_NAME["relu2_mlp"].cases)
    for k in of_mlp:
        got = k["instructions"]
        assert got["HGMMA"] == 4 and got["UTMALDG"] >= 4 and got["UTMASTG"] == 2, describe(k)
        assert "LDG" not in got and "STG" not in got and k["num_warps"] == 8, describe(k)


def test_attention_multiplies_in_tensor_cores_fed_by_bulk_copies(kernels):
    """Two products a step forward, three for dq, four for dk and dv; what threads load is a number a token: where
    documents begin and end, logarithms and sums. Nothing adds to memory."""
    of_attention = [k for k in kernels if k["op"] == "attention" and k["dtype"] == "bfloat16"]
    assert len(of_attention) == 3 * len(BY_NAME["attention"].cases)
    for k in of_attention:
        got, (part, a) = k["instructions"], (k["kernel"].split("_")[2], k["arguments"])
        across, queries, keys = a["BLOCK_D"] // 16, a["BLOCK_M"] // 16, a["BLOCK_N"] // 16
        products = {"fwd": across + keys, "dq": 2 * across + keys, "dkv": 2 * across + 2 * queries}[part]
        assert got["HGMMA"] == products and k["num_warps"] == 8 and a["BULK"], describe(k)
        assert got["UTMALDG"] >= 5 and got["UTMASTG"] == (2 if part == "dkv" else 1), describe(k)
        assert got.get("LDG", 0) <= 6 and got.get("STG", 0) <= 1 and not set(ATOMICS) & set(got), describe(k)
        # tiles of a step are loaded while another is multiplied, and edges are a branch that most steps skip
        assert part != "dkv" or got["LDGSTS"] >= 2, describe(k)
        assert k["flat"] and k["epilogue"] > 100, describe(k)


def test_polar_express_multiplies_in_tensor_cores_and_mirrors(kernels):
    """Three products a step; the two symmetric ones store a tile twice."""
    of_polar = [k for k in kernels if k["op"] == "polar_express" and k["dtype"] == "bfloat16"]
    small = [k for k in of_polar if k["kernel"] == "_small_kernel"]
    large = [k for k in of_polar if k["kernel"] == "_gemm_kernel"]
    assert [k["case"] for k in small] == ["depth 12, gates"] and small[0]["instructions"]["HMMA"] >= 15
    assert len(large) == 15 * (len(BY_NAME["polar_express"].cases) - 1)
    for i, k in enumerate(large):
        got, halves = k["instructions"], k["arguments"]["SPLIT"]
        assert got["HGMMA"] == 4 and got["UTMALDG"] >= 4 and "STG" not in got, describe(k)
        assert got["UTMASTG"] == (halves if i % 3 == 2 else 2), describe(k)


def test_lm_head_loss_multiplies_in_tensor_cores(kernels):
    """In fp8 logits, dx and dw; in bf16 they are cuBLAS's. Bulk copies store, and in later chunks add. Rows are read
    and written 16 bytes at a time."""
    of_head = [
        k for k in kernels if k["op"] == "lm_head_loss" and k["dtype"] == "bfloat16" and k["case"] != "quickstart"
    ]
    products = [k for k in of_head if k["kernel"] == "_gemm_kernel"]
    assert len(products) >= 4 and {k["form"] for k in products} == {"fp8"}
    for k in products:
        got = k["instructions"]
        assert got["QGMMA"] == 4 and got["UTMALDG"] >= 4 and "STG" not in got and "RED" not in got, describe(k)
        assert (got.get("UTMASTG", 0), got.get("UTMAREDG", 0)) in ((2, 0), (0, 2)), describe(k)
    assert any("UTMAREDG" in k["instructions"] for k in products)
    for k in of_head:
        if k["kernel"] == "_row_kernel":
            got = k["instructions"]
            assert got["LDG.E.128"] > 0 and got["STG.E.128"] > 0 and got["LDG"] - got["LDG.E.128"] <= 4, describe(k)


def test_fp8_linear_multiplies_in_tensor_cores_what_one_pass_quantises(kernels):
    """A pass reads 16 bytes at a time, but for the scale, and writes both copies so; bulk copies feed products and
    store or add their results."""
    quantised = ["_transpose_kernel", "_gemm_kernel", "_transpose_kernel", "_gemm_kernel", "_gemm_kernel"]
    for case in BY_NAME["fp8_linear"].cases:
        for form in forms(BY_NAME["fp8_linear"], MAIN):
            chosen = {"op": "fp8_linear", "case": case, "form": form, "dtype": "bfloat16"}
            launches = [k for k in kernels if k.items() >= chosen.items()]
            assert [k["kernel"] for k in launches] == quantised
            for k in launches:
                passes_or_multiplies(k, adds=form != "plain" and k is launches[-1])


def passes_or_multiplies(k, adds):
    """Of a pass that quantises, or of a product in fp8, which adds to a sum or stores."""
    got = k["instructions"]
    if k["kernel"] == "_transpose_kernel":
        assert got["LDG"] - got["LDG.E.128"] == 1 and got["STG"] == got["STG.E.128"] == 4, describe(k)
        return
    assert got["QGMMA"] == 4 and got["UTMALDG"] >= 4 and "STG" not in got and "RED" not in got, describe(k)
    assert ("UTMAREDG" in got, "UTMASTG" in got) == (adds, not adds), describe(k)
    assert static.ctas_per_sm(90, k["registers"], k["num_warps"], k["shared_bytes"]) >= 1, describe(k)


def test_fp8_mlp_multiplies_in_tensor_cores_and_quantises_in_epilogues(kernels):
    """One pass, over the upstream gradient. An epilogue stores halves of a tile in both layouts and raises one largest
    size with one atomic."""
    order = ["_fp8_relu2_kernel", "_gemm_kernel", "_transpose_kernel", "_fp8_relu2_kernel", *3 * ["_gemm_kernel"]]
    for case in BY_NAME["fp8_mlp"].cases:
        for form in forms(BY_NAME["fp8_mlp"], MAIN):
            chosen = {"op": "fp8_mlp", "case": case, "form": form, "dtype": "bfloat16"}
            launches = [k for k in kernels if k.items() >= chosen.items()]
            assert [k["kernel"] for k in launches] == order
            for i, k in enumerate(launches):
                passes_or_multiplies(k, adds=form == "sum" and i >= len(order) - 2)
                if k["kernel"] == "_fp8_relu2_kernel":
                    got = k["instructions"]
                    # Triton makes a descriptor of each tensor with an atomic
                    atomics = sum(got.get(name, 0) for name in ATOMICS)
                    assert got["UTMASTG"] == 4 and atomics == 1 + 4 + k["arguments"]["BACKWARD"], describe(k)
                    cut = tiles(k)
                    M, C, F = k["shape"]
                    a = k["arguments"]
                    assert cut.tiles == -(-M // a["BLOCK_M"]) * -(-F // a["BLOCK_N"]) and k["itemsize"] == 1, describe(
                        k
                    )
                    if (
                        C > a["BLOCK_K"]
                    ):  # a loop over K, and around it one with the epilogue: both layouts of both halves
                        assert k["epilogue"] > 3 * k["loop"] and not k["flat"], describe(k)


def test_a_pass_over_several_tiles_has_a_loop_that_the_model_counts(kernels):
    """Its instructions are issued once for each tile: those of the loop are nearly all of a pass over one tile."""
    passes = [k for k in kernels if k["kernel"] == "_transpose_kernel" and k["dtype"] == "bfloat16"]
    (one,) = {k["length"] for k in passes if k["arguments"]["STEPS"] == 1 and not k["arguments"]["HAS_AMAX"] and
              k["arguments"]["QUANTISE"]}  # fmt: skip
    several = [k for k in passes if k["arguments"]["STEPS"] > 1]
    assert {k["arguments"]["STEPS"] for k in several} >= {2, 8}
    for k in several:
        assert 0.8 * one < k["loop"] < k["length"] < 1.5 * one, describe(k)


def test_rope_qk_norm_moves_16_bytes_at_a_time(kernels):
    """But for the statistics of a head, the channels and weights of its gate, and their gradients: a few numbers."""
    for k in kernels:
        if k["op"] == "rope_qk_norm" and k["dtype"] == "bfloat16" and k["case"] != "quickstart":
            got = k["instructions"]
            assert got["LDG"] - got["LDG.E.128"] <= 5 and got["STG"] - got["STG.E.128"] <= 2, describe(k)


def test_decode_attention_reads_the_cache_16_bytes_at_a_time(kernels):
    """In asynchronous copies, of two steps before the loop and one within it. Threads multiply their numbers, or tensor
    cores where heads share them. Alone are a row's length and the query. Several programs share an SM."""
    of_decode = [k for k in kernels if k["op"] == "decode_attention"]
    assert {k["kernel"] for k in of_decode} == {"_decode_one_kernel", "_decode_group_kernel", "_decode_merge_kernel"}
    for k in of_decode:
        got, (B, _, H, G, _, _) = k["instructions"], k["shape"]
        ctas = static.ctas_per_sm(90, k["registers"], k["num_warps"], k["shared_bytes"])
        if k["kernel"] == "_decode_merge_kernel":
            assert k["programs"] == B * H and "LDGSTS" not in got, describe(k)
            continue
        grouped = k["kernel"] == "_decode_group_kernel"
        assert got["LDGSTS"] == got["LDGSTS.E.128"] == (48 if grouped else 24), describe(k)
        assert got["LDG"] == 2 and ("HMMA" in got) == grouped == (H > G), describe(k)
        assert ctas >= (3 if grouped else 4), describe(k)
        assert k["programs"] == B * G * k["arguments"]["splits"], describe(k)


def test_embedding_moves_16_bytes_at_a_time(kernels):
    """But for tokens and their order, which are single numbers, and the quickstart's parts of 32 columns."""
    for k in kernels:
        if k["op"] == "embedding" and k["case"] != "quickstart":
            got = k["instructions"]
            assert got["LDG.E.128"] > 0 and got["STG"] == got["STG.E.128"] and "ATOM" not in got, describe(k)
            assert got["LDG"] - got["LDG.E.128"] <= 8 and k["registers"] <= 64, describe(k)


def test_adam_update_moves_16_bytes_at_a_time(kernels):
    """But for the six hyperparameters."""
    tensors = {"plain": (4, 3), "master": (5, 4)}  # of states and gradient: reads, writes
    for k in kernels:
        if k["op"] == "adam_update":
            got, (reads, writes) = k["instructions"], tensors[k["form"]]
            assert got["LDG"] - got["LDG.E.128"] == 6 and got["STG"] == got["STG.E.128"], describe(k)
            assert got["LDG.E.128"] >= reads and got["STG.E.128"] >= writes, describe(k)


def test_muon_update_moves_16_bytes_at_a_time(kernels):
    """Whole matrices, at the tracks' sizes; single numbers are a hyperparameter, a sum, or a factor of a row."""
    of_muon = [k for k in kernels if k["op"] in ("muon_momentum", "muon_apply") and not k["case"].endswith("gates")]
    narrow = {  # loads, stores
        "_muon_momentum_kernel": (1, 1), "_muon_columns_kernel": (1, 0), "_muon_squares_kernel": (0, 1),
        "_muon_scale_kernel": (0, 1), "_muon_factor_kernel": (0, 0), "_muon_apply_kernel": (5, 0),
    }  # fmt: skip
    assert {k["kernel"] for k in of_muon} == set(narrow)
    for k in of_muon:
        got, (loads, stores) = k["instructions"], narrow[k["kernel"]]
        assert got["LDG"] - got["LDG.E.128"] <= loads and got["LDG.E.128"] > 0, describe(k)
        assert got["STG"] - got.get("STG.E.128", 0) <= stores, describe(k)


@pytest.mark.parametrize("capability", [80, 86, 120])
def test_other_gpus_take_smaller_tiles(capability):
    """Those with 99 KiB for a block, and the A100 with its 163."""
    compiled = own(*static.facts(["polar_express", "relu2_mlp"], [capability]))
    assert {(k["op"], k["case"]) for k in compiled} == {("polar_express", "depth 24, MLP"), ("relu2_mlp", "depth 24")}
    for k in compiled:
        assert k["spill_bytes"] == 0 and k["shared_bytes"] <= (163 if capability == 80 else 99) * 1024, describe(k)


def test_a_spill_would_be_seen(tmp_path):
    """The checks above read what they should: a kernel with too much in registers spills, and the report says so."""
    (tmp_path / "greedy.py").write_text(GREEDY)
    env = environment()
    env["PYTHONPATH"] = f"{ROOT}:{tmp_path}:{env.get('PYTHONPATH', '')}"
    done = subprocess.run([sys.executable, "-m", "greedy"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (facts,) = json.loads(done.stdout)
    assert facts["spill_bytes"] > 0 and facts["instructions"]["STL"] > 0


GREEDY = """
import json, torch, triton, triton.language as tl
from bench.aot import compile_only, with_instructions

@triton.jit
def greedy(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x / tl.sum(x * x))

with compile_only() as compiled:
    greedy[(1,)](torch.empty(2**15), torch.empty(2**15), BLOCK=2**15, num_warps=2)
print(json.dumps(with_instructions(compiled)))
"""


def test_this_process_interprets():
    assert interpreted() or torch.cuda.is_available()


def test_launches_are_those_of_the_op_itself():
    """With products of torch, and its passes for largest sizes; not what makes the inputs, such as copies in fp8."""
    done = subprocess.run([sys.executable, "-c", LAUNCHES], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    transpose, gemm, fused, in_bf16 = "_transpose_kernel", "_gemm_kernel", "_fp8_relu2_kernel", "_relu2_gemm_kernel"
    # scales of their own, of x and of dy
    assert found["fp8_linear"] == [LIBRARY, transpose, gemm, LIBRARY, transpose, gemm, gemm]
    assert found["fp8_mlp"] == [fused, gemm, transpose, fused, gemm, gemm, gemm]
    assert found["relu2_mlp"] == [in_bf16, LIBRARY, in_bf16, *3 * [LIBRARY]]
    assert found["quantise_weight"] == [LIBRARY, transpose]


LAUNCHES = """
import json, torch
import kernels.op
from bench.aot import launches
from kernels.ops import BY_NAME

kernels.op.COMPILED_FOR = (9, 0)
names = "fp8_linear", "fp8_mlp", "relu2_mlp", "quantise_weight"
found = {name: launches(BY_NAME[name], (64, 64, 128), torch.bfloat16, "plain", 90) for name in names}
print(json.dumps({name: [k["kernel"] for k in each] for name, each in found.items()}))
"""


def test_gradients_that_are_added_to_sums_fit():
    """Those of the MLP and of attention, which the bulk copies add; two programs share an SM where the tiles are
    small."""
    done = subprocess.run([sys.executable, "-c", SUMS], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = json.loads(done.stdout)
    assert len(compiled) == 8 and {k["instructions"]["UTMAREDG"] for k in compiled} == {2, 4}
    for k in compiled:
        got, small = k["instructions"], k["instructions"]["UTMAREDG"] == 4
        assert k["spill_bytes"] == 0 and not k["serialized"] and k["shared_bytes"] <= MAX_SHARED, k
        assert got["HGMMA"] == 4 and got["UTMALDG"] >= 4 and not {"UTMASTG", "RED", "LDG", "STG"} & set(got), k
        assert static.ctas_per_sm(90, k["registers"], k["num_warps"], k["shared_bytes"]) == (2 if small else 1), k


SUMS = """
import json, torch
from bench.aot import compile_only, with_instructions
from kernels.gemm import gemm
from kernels.sizes import SIZES

with compile_only() as compiled:
    for label, s in SIZES.items():
        if label != "quickstart":
            for M, N in ((s.F, s.C), (s.C, s.C)):
                operands = (torch.empty(s.tokens, n, dtype=torch.bfloat16) for n in (M, N))
                gemm(*operands, torch.empty(M, N), transposed=True, accumulate=True)
print(json.dumps(with_instructions(compiled)))
"""


def test_attention_by_pointers_fits():
    """Heads of 96 channels in rows that end within a tile: neither is for bulk copies."""
    done = subprocess.run([sys.executable, "-c", POINTERS], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = json.loads(done.stdout)
    assert [k["kernel"].split("_")[2] for k in compiled] == ["fwd", "dq", "dkv"]
    for k in compiled:
        got = k["instructions"]
        assert k["spill_bytes"] == 0 and not k["serialized"] and k["shared_bytes"] <= 232_448, k
        assert got["HGMMA"] >= 12 and "UTMALDG" not in got and got["LDGSTS.E.128"] >= 8, k


POINTERS = """
import json, torch
import kernels.op
from bench.aot import launches, with_instructions
from kernels.attention import attention

kernels.op.COMPILED_FOR = (9, 0)
shape = (2, 2000, 4, 2, 96, 513, 0)
print(json.dumps(with_instructions(launches(attention, shape, torch.bfloat16, "plain", 90))))
"""
