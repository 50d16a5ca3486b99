"""The check of compiled kernels: red on what got worse, quiet on what may move, compiled once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import triton

from bench import aot, static
from bench.kernel_model import predict
from bench.roofline import multiplies_in
from csrc import build
from kernels.ops import BY_NAME
from tests.mutations import Edit, edited

ROOT = Path(__file__).resolve().parent.parent
BASELINES = ROOT / "bench" / "baselines"


def launch(**changes):
    """Facts of a launch that does not exist."""
    facts = {
        "op": "rms_norm", "capability": 90, "case": "depth 24", "shape": [65536, 1536], "form": "plain",
        "dtype": "bfloat16",
        "kernel": "_rms_norm_fwd_kernel", "num_warps": 4, "shared_bytes": 1024, "tensor_memory": 0, "registers": 40,
        "spill_bytes": 0, "serialized": False, "loop": 50, "variant": 0, "backward": False,
        "epilogue": 0, "flat": False, "length": 200, "programs": 32768, "bytes": 201_326_592, "itemsize": 2,
        "arguments": {"M": 65536, "N": 1536},
        "instructions": {"HGMMA": 4, "UTMALDG": 2, "LDG": 5, "LDG.E.128": 3, "STG": 4, "STG.E.128": 3, "BAR": 2},
    }  # fmt: skip
    return facts | changes


def instructions(**changes):
    return {"instructions": launch()["instructions"] | {name.replace("_", "."): n for name, n in changes.items()}}


def changed(**changes):
    return static.compare(static.table([launch()]), static.table([launch(**changes)]), {})


WORSE = {
    "spill_bytes": {"spill_bytes": 4},
    "serialized": {"serialized": True},
    "shared_bytes": {"shared_bytes": 1028},
    "occupancy": {"registers": 168},
    "tensor HGMMA": instructions(HGMMA=3),
    "bulk UTMALDG": instructions(UTMALDG=0),
    "wide_loads": instructions(LDG=4, LDG_E_128=2),
    "wide_stores": instructions(STG=3, STG_E_128=2),
    "narrow_loads": instructions(LDG=6),
    "narrow_stores": instructions(STG=5),
    "local_loads": instructions(LDL=1),
    "local_stores": instructions(STL=1),
    "atomics": instructions(RED=1),
}


@pytest.mark.parametrize("counter", WORSE)
def test_each_hard_counter_fails(counter):
    (change,) = changed(**WORSE[counter])
    assert change.kind == "worse" and change.text.startswith(f"{counter} "), change
    (back,) = static.compare(static.table([launch(**WORSE[counter])]), static.table([launch()]), {})
    assert back.kind == "better"
    assert {name.split()[0] for name in WORSE} == set(static.HARD) - {"launches"}


def test_another_launch_fails():
    (change,) = static.compare(static.table([launch()]), static.table([launch(), launch()]), {})
    assert change.kind == "worse" and change.text.startswith("launches "), change


@pytest.mark.parametrize("moved", [{"registers": 39}, {"loop": 99}, instructions(BAR=3)])
def test_registers_loops_and_barriers_may_move(moved):
    (change,) = changed(**moved)
    assert change.kind == "moved" and "→" in change.text


def test_other_products_are_no_substitute():
    (change,) = changed(**instructions(HGMMA=0, HMMA=64))
    assert (
        change.kind == "worse" and change.text == "tensor HGMMA 4 → 0, tensor HMMA 0 → 64, loop_per_product 12.5 → 0.8"
    )


def test_new_and_missing_kernels_and_those_that_do_not_compile_fail():
    one, other = launch(), launch(case="depth 26", registers=50)
    both, first = static.table([one, other]), static.table([one])
    for old, new, kind in ((both, first, "gone"), (first, both, "new")):
        (change,) = static.compare(old, new, {})
        assert change.kind == kind and kind in static.FAILING and "depth 26" in change.key
    errors = {"sm_90 / rms_norm": "Traceback\nValueError: no such type"}
    (change,) = static.compare(both, {}, errors)
    assert change.kind == "broken" and "broken" in static.FAILING and "ValueError: no such type" in change.text


def test_the_worst_stands_first():
    old = [launch(case=str(i)) for i in range(4)]
    worse = [launch(case="1", shared_bytes=2048), launch(case="2", spill_bytes=8)]
    new = [launch(case="0", registers=39), *worse, launch(case="3")]
    changes = static.compare(static.table(old), static.table(new), {})
    assert [change.key.split(" / ")[2] for change in changes] == ["2", "1", "0"]


def test_variants_of_a_kernel_are_told_apart_and_repeated_launches_are_not():
    rows = static.table([launch(), launch(variant=1, registers=50), launch()])
    assert [key[-2:] for key in rows] == ["el", "#2"]


# occupancy: what cuda_occupancy.h of CUDA 13.0 computes, which agrees on 9,600 combinations


@pytest.mark.parametrize(
    "capability, registers, warps, shared, ctas",
    [
        (90, 32, 4, 0, 16),  # the warps of an SM
        (90, 16, 1, 0, 32),  # its blocks
        (90, 168, 8, 0, 1),  # registers: 12 warps, in threes a partition
        (90, 160, 8, 180_248, 1),  # shared memory of relu2_mlp
        (90, 111, 8, 113_664, 2),
        (90, 40, 4, 232_448, 1),  # the most a block may have
        (80, 255, 4, 0, 2),
        (80, 128, 4, 98_304, 1),
        (100, 56, 4, 4096, 9),
        (120, 32, 4, 0, 12),
        (120, 16, 1, 0, 24),
        (120, 40, 4, 50_176, 2),
    ],
)
def test_occupancy(capability, registers, warps, shared, ctas):
    assert static.ctas_per_sm(capability, registers, warps, shared) == ctas


def test_tensor_memory_limits_blocks():
    assert static.ctas_per_sm(100, 32, 4, 0, tensor_memory=256) == 2


# SASS

SASS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDG.E R8, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128.CONSTANT R12, desc[UR4][R2.64] ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/                   UTMALDG.2D [UR8], [UR6] ;
        /*0050*/                   HFMA2.MMA R7, -RZ, RZ, 0, 0 ;
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR21], R5 ;
        /*0070*/              @!P0 BRA 0x110 ;
        /*0080*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*0090*/              @!P1 BRA 0x60 ;
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00b0*/              @!P2 BRA 0x40 ;
        /*00c0*/              @!P2 EXIT ;
        /*00d0*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*00e0*/                   IADD3 R2, R2, 0x1, RZ ;
        /*00f0*/              @!P3 BRA 0xd0 ;
        /*0100*/                   EXIT ;
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR21], R5 ;
        /*0120*/              @!P0 BRA 0x110 ;
        /*0130*/                   BRA 0x80 ;
        /*0140*/                   BRA 0x140 ;
"""


def test_sass_is_read():
    facts = aot.read_sass(SASS)
    assert facts["instructions"] == {
        "BAR": 1, "HGMMA": 1, "LDG": 3, "LDG.E.128": 2, "STG": 1, "UTMALDG": 1,
    }  # fmt: skip
    assert facts["loop"] == 4  # TRYWAIT, BRA, HGMMA, BRA: not the one around it, nor a longer one without products
    assert (facts["epilogue"], facts["flat"]) == (4, False)  # UTMALDG, HFMA2, BAR, BRA of the loop around it
    assert facts["length"] == 20  # up to the branch to itself


FLAT = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0030*/              @!P0 BRA 0x80 ;
        /*0040*/                   FADD R2, R2, R2 ;
        /*0050*/                   FADD R2, R2, R2 ;
        /*0060*/                   FADD R2, R2, R2 ;
        /*0070*/                   UTMASTG.2D [UR8], [UR6] ;
        /*0080*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0090*/              @!P1 BRA 0x10 ;
        /*00a0*/                   EXIT ;
"""


def test_the_epilogue_of_a_flattened_loop_is_what_a_branch_leaves_out():
    facts = aot.read_sass(FLAT)
    assert (facts["loop"], facts["epilogue"], facts["flat"], facts["length"]) == (9, 4, True, 11)
    assert aot.read_sass(FLAT.replace("@!P0 BRA 0x80", "@!P0 BRA 0xa0"))["epilogue"] == 0  # leaves the loop
    row = static.row(launch(loop=9, epilogue=4, flat=True))
    assert row["loop_per_product"] == 1.2 and row["epilogue"] == 4  # (9 - 4) / 4


def test_notes_behind_an_instruction_change_nothing():
    noted = SASS.replace(" ;", "      &req={1}    ?trans10;")
    assert noted != SASS and aot.read_sass(noted) == aot.read_sass(SASS)


def test_without_products_the_longest_inner_loop_counts():
    without = SASS.replace("HGMMA.64x256x16", "FFMA")
    assert aot.read_sass(without)["loop"] == 8  # the one in it only waits
    assert aot.read_sass(without.replace("TRYWAIT", "PARITY"))["loop"] == 4
    assert aot.read_sass("        /*0000*/                   EXIT ;\n")["loop"] == 0


# least times


def test_roofline_says_what_binds():
    found = static.roofline([launch(), launch(backward=True), launch(op="polar_express", case="depth 24, attention")])
    plain = "rms_norm / depth 24 / plain / bfloat16"
    least = {key: (row["us"], row["bound"]) for key, row in found.items()}
    assert least[f"{plain} / forward"] == (60.1, "memory")  # 2 x 32768 x 1536 x 2 B at 3.35 TB/s
    assert least[f"{plain} / backward"] == (90.15, "memory")
    # 5 steps x 96 x 4 x 1536^3 FLOPs at 989 TFLOP/s
    assert least["polar_express / depth 24, attention / plain / bfloat16 / forward"] == (7035.0, "flops")
    assert len(found) == 3


def test_what_multiplies_in_fp8_is_held_to_its_peak():
    found = static.roofline(
        [launch(op=op, form=form) for op, form in (("fp8_linear", "given"), ("lm_head_loss", "fp8"))]
    )
    # 2 x 32768 x 1536 x 4608 FLOPs, and 6 x 32768 x 1536 x 32768, at 1979 TFLOP/s
    assert [(row["us"], row["bound"]) for row in found.values()] == [(234.4, "flops"), (5000.0, "flops")]
    forms = [("fp8_mlp", "sum"), ("lm_head_loss", "mean"), ("rms_norm", "mix3_fp8"), ("quantise_weight", "plain")]
    fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16
    # a norm and a weight that become fp8 multiply nothing
    assert [multiplies_in(BY_NAME[op], form, bf16) for op, form in forms] == [fp8, bf16, bf16, bf16]


def test_predictions_stand_beside_least_times():
    """Of all launches of a direction, products of libraries included, which are no rows of the table."""
    library = launch(kernel="mm", product=(1, 8192, 8192, 8192, 2), op="relu2_mlp", variant=None)
    one, two = launch(), launch(bytes=2 * launch()["bytes"])
    found = static.roofline([one, two, library])
    row = found["rms_norm / depth 24 / plain / bfloat16 / forward"]
    assert row["predicted_us"] == pytest.approx(sum(predict(k).us for k in (one, two)), rel=1e-3)
    assert row["share"] == pytest.approx(row["us"] / row["predicted_us"], abs=0.01) and row["by"] == "memory"
    assert found["relu2_mlp / depth 24 / plain / bfloat16 / forward"]["by"] == "library"
    assert len(static.table([one, library])) == 1


# the command, on facts that are given


@pytest.fixture
def command(monkeypatch, tmp_path):
    """(kernels, errors, *arguments) -> exit status; its baselines lie in tmp_path/static."""

    def run(kernels, *argv, errors=None):
        monkeypatch.setattr(static, "facts", lambda ops, **_: (kernels, errors or {}))
        return static.main([*argv, "--cache-dir", str(tmp_path)], root=tmp_path, baselines=tmp_path / "static")

    return run


def only_baseline(tmp_path):
    (file,) = (tmp_path / "static").iterdir()
    return json.loads(file.read_text())


def test_check_goes_red_on_a_spill_and_green_after_an_update(command, tmp_path, capsys):
    assert command([launch()], "--update", "--reason", "first numbers") == 0
    assert command([launch()], "--check") == 0
    capsys.readouterr()
    spilled = [launch(spill_bytes=128, registers=255)]
    assert command(spilled, "--check") == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(
        "worse   sm_90 / rms_norm / depth 24 / plain / bfloat16 / _rms_norm_fwd_kernel: spill_bytes 0 → 128"
    )
    assert command(spilled, "--update", "--reason", " larger tiles ") == 0
    assert command(spilled, "--check") == 0
    reasons = only_baseline(tmp_path)["reasons"]
    assert [(r["reason"], r["changed"]) for r in reasons] == [
        ("larger tiles", "1 worse (rms_norm)"),
        ("first numbers", "1 new (rms_norm)"),
    ]
    assert all(len(r["date"]) == 10 for r in reasons)


@pytest.mark.parametrize(
    "kernels, errors", [([], {}), ([launch(), launch(case="depth 26")], {}), ([], {"sm_90 / rms_norm": "why"})]
)
def test_check_goes_red_on_missing_new_and_broken_kernels(command, kernels, errors):
    command([launch()], "--update", "--reason", "first numbers")
    assert command(kernels, "--check", errors=errors) == 1


def test_check_reports_improvements_with_the_command_that_keeps_them(command, capsys):
    command([launch(spill_bytes=8)], "--update", "--reason", "first numbers")
    assert command([launch()], "--check") == 0
    out = capsys.readouterr().out
    assert "better" in out and "spill_bytes 8 → 0" in out and "--update --reason" in out


def test_another_cost_is_reported_and_kept(command, monkeypatch, tmp_path, capsys):
    command([launch()], "--update", "--reason", "first numbers")
    monkeypatch.setattr(BY_NAME["rms_norm"], "cost", lambda *_: (10**12, 1))
    assert command([launch()], "--check") == 0
    assert (
        "time    rms_norm / depth 24 / plain / bfloat16 / forward: at least 60.1 us, memory; predicted 65.32, memory → "
        "at least 1011.0 us, flops; predicted 65.32, memory" in capsys.readouterr().out
    )
    command([launch()], "--update", "--reason", "counted again")
    assert len(only_baseline(tmp_path)["reasons"]) == 2 and command([launch()], "--check") == 0


def test_an_update_without_change_writes_nothing(command, tmp_path, capsys):
    command([launch()], "--update", "--reason", "first numbers")
    (file,) = (tmp_path / "static").iterdir()
    before = file.stat().st_mtime_ns
    assert command([launch()], "--update", "--reason", "again") == 0
    assert file.stat().st_mtime_ns == before and "nothing changed" in capsys.readouterr().out


def test_an_update_of_one_op_leaves_the_others(command, tmp_path):
    other = launch(op="adam_update", form="plain", case="depth 24")
    command([launch(), other], "--update", "--reason", "first numbers")
    assert command([launch(registers=60)], "--update", "--reason", "more", "--ops", "rms_norm") == 0
    rows = only_baseline(tmp_path)["kernels"]
    assert sorted(row["registers"] for row in rows.values()) == [40, 60]


def test_nothing_is_written_where_something_does_not_compile(command, tmp_path, capsys):
    errors = {"sm_80 / rms_norm": "exit status 1: ValueError: type not supported"}
    assert command([launch()], "--update", "--reason", "first numbers", errors=errors) == 1
    assert not (tmp_path / "static").exists() and "type not supported" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ["--update"],
        ["--update", "--reason", " "],
        ["--check", "--reason", "x"],
        ["--check", "--update"],
        ["--ops", "rms"],
    ],
    ids=" ".join,
)
def test_wrong_usage(command, argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        command([launch()], *argv)
    assert (
        stopped.value.code == 2
        and "expected" in (err := capsys.readouterr().err)
        or "reason" in err
        or "not allowed" in err
    )


def test_no_baseline_is_a_sentence(command, tmp_path, capsys):
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "triton-3.1.4.json").write_text("{}")
    assert command([launch()], "--check") == 1
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and triton.__version__ in out and "3.1.4" in out and "--update --reason" in out


def test_a_baseline_with_a_merge_conflict_is_a_sentence(command, tmp_path, capsys):
    command([launch()], "--update", "--reason", "first numbers")
    (file,) = (tmp_path / "static").iterdir()
    file.write_text("<<<<<<< HEAD\n" + file.read_text())
    capsys.readouterr()
    assert command([launch()], "--check") == 1
    assert "is not JSON" in capsys.readouterr().out


# the cache

COMPILER = """
import json, sys
with open("calls", "a") as calls:
    for task in sys.argv[1:]:
        op, capability = task.split("@")
        calls.write(task + "\\n")
        broken = "broken" in open(f"kernels/{op}.py").read()
        kernels = [] if broken else [{"op": op, "capability": int(capability)}]
        found = {"op": op, "capability": int(capability), "error": "it is" if broken else None, "kernels": kernels}
        print(json.dumps(found))
"""


OPS = ["rms_norm", "adam_update"]


@pytest.fixture
def checkout(tmp_path):
    """A tree whose compiler only says that it was called."""
    files = {
        "bench/__init__.py": "",
        "bench/aot.py": COMPILER,
        "kernels/tile.py": "",
        "kernels/dispatch.py": "from kernels import size",
    }
    files |= {"kernels/size.py": "", "kernels/other.py": ""}
    files |= {f"kernels/{op}.py": "from kernels.dispatch import Op\nfrom kernels import tile" for op in OPS}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def compiled():
        """The facts now, and what was compiled for them."""
        (tmp_path / "calls").write_text("")
        found, errors = static.facts(OPS, [90, 80], root=tmp_path, folder=tmp_path / "cache")
        assert len(found) + 2 * len(errors) // 2 == 4
        return sorted((tmp_path / "calls").read_text().split()), errors

    return tmp_path, compiled


BOTH = ["adam_update@80", "adam_update@90", "rms_norm@80", "rms_norm@90"]


def test_each_op_is_compiled_once_until_its_source_changes(checkout):
    tree, compiled = checkout
    assert compiled() == (BOTH, {}) and compiled() == ([], {})
    source = tree / "kernels" / "rms_norm.py"
    source.write_text(source.read_text() + "\n# changed")
    assert compiled() == (["rms_norm@80", "rms_norm@90"], {}) and compiled() == ([], {})
    (tree / "kernels" / "other.py").write_text("# nobody imports it")
    assert compiled() == ([], {})
    for shared in ("kernels/tile.py", "kernels/dispatch.py", "kernels/size.py", "bench/aot.py"):
        (tree / shared).write_text((tree / shared).read_text() + "# changed")
        assert compiled() == (BOTH, {}), shared
    assert not [file for file in (tree / "cache").iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("damage", ["", '{"kernels": [', "[]", '{"kernel": []}'])
def test_a_damaged_cache_is_compiled_again(checkout, capsys, damage):
    tree, compiled = checkout
    compiled()
    victim = next((tree / "cache").glob("rms_norm-sm_80-*"))
    victim.write_text(damage)
    assert compiled() == (["rms_norm@80"], {}) and "damaged" in capsys.readouterr().err
    assert compiled() == ([], {})


def test_what_does_not_compile_is_tried_again(checkout):
    tree, compiled = checkout
    (tree / "kernels" / "rms_norm.py").write_text("broken")
    for _ in range(2):
        calls, errors = compiled()
        assert errors == {"sm_90 / rms_norm": "it is", "sm_80 / rms_norm": "it is"} and "rms_norm@90" in calls


def test_a_compiler_that_dies_is_an_error(checkout):
    tree, compiled = checkout
    (tree / "bench" / "aot.py").write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="ended with 3"):
        compiled()


# csrc

COPY = """
#include "turn.h"
#include <vector>
enum class Way { here, there };
namespace redline { namespace {
template <class T, int kWarps, bool kTurned, Way kWay>
__global__ void __launch_bounds__(32 * kWarps) copy(const T* x, T* y) requires(kWarps > 0) { turn(x, y); }
__global__ void plain(int* x, void (*)(int)) { *x = 1; }
}}
namespace other { __global__ void plain(int* x, void (*)(int)) { *x = 2; } }
extern "C" __global__ void __launch_bounds__(256) wide(const float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; }
void launch() {
    std::vector<float> host(1);
    redline::copy<float, 4, true, Way::there><<<1, dim3(32, 4)>>>(nullptr, nullptr);
    redline::copy<__nv_bfloat16, 4, false, Way::here><<<1, dim3(32, 4)>>>(nullptr, nullptr);
    redline::plain<<<1, 1>>>(nullptr, nullptr);
}
"""
TURN = """
#include <cuda_bf16.h>
template <class T> __device__ void turn(const T* x, T* y) {
    __shared__ T tile[32][33];
    tile[threadIdx.y][threadIdx.x] = x[threadIdx.y * 32 + threadIdx.x];
    __syncthreads();
    y[threadIdx.y * 32 + threadIdx.x] = tile[threadIdx.x][threadIdx.y];
}
"""
NVCC = build.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")


@pytest.fixture
def csrc(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "copy.cu").write_text(COPY)
    (tmp_path / "csrc" / "turn.h").write_text(TURN)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "aot.py").write_text("")
    return tmp_path


@needs_nvcc
def test_cuda_kernels_have_the_same_facts(csrc):
    """Templates with C++20, host code, a header, kernels without a public name; in the order of names."""
    nvcc = build.Nvcc.of(NVCC)
    found, errors = static.cuda_facts(nvcc, csrc, folder=csrc / "cache")
    rows = static.table(found)
    names = ["copy<bf16, 4, false, (Way)0>", "copy<float, 4, true, (Way)1>", "plain", "plain #2", "wide"]
    assert not errors and list(rows) == [f"sm_90 / csrc/copy.cu / nvcc {nvcc.release} / {name}" for name in names]
    assert [k["kernel"] for k in found] == [name.removesuffix(" #2") for name in names]
    half, copy, plain, _, wide = rows.values()
    assert (wide["wide_loads"], wide["wide_stores"], wide["warps"], wide["occupancy"]) == (1, 1, 8, 1.0)
    assert (copy["narrow_loads"], copy["narrow_stores"], copy["barriers"], copy["warps"]) == (1, 1, 1, 4)
    assert (copy["shared_bytes"], half["shared_bytes"]) == (32 * 33 * 4, 32 * 33 * 2)
    assert "warps" not in plain and "occupancy" not in plain


@needs_nvcc
def test_facts_of_cuda_kernels_follow_their_sources(csrc, monkeypatch):
    nvcc, compiled, honest = build.Nvcc.of(NVCC), [], aot.compile_cuda
    monkeypatch.setattr(aot, "compile_cuda", lambda *args: compiled.append(1) or honest(*args))

    def facts():
        before = len(compiled)
        return static.cuda_facts(nvcc, csrc, folder=csrc / "cache"), len(compiled) - before

    first, calls = facts()
    assert calls == 1 and facts() == (first, 0)
    (csrc / "csrc" / "turn.h").write_text(TURN.replace("tile[32][33]", "tile[32][35]"))
    (changed, _), calls = facts()
    assert calls == 1 and changed != first[0]
    (csrc / "csrc" / "copy.cu").write_text("no C++")
    for _ in range(2):
        (_, errors), calls = facts()
        assert calls == 1 and "copy.cu(1): error" in errors["sm_90 / csrc/copy.cu"]
    assert "copy.cu(1): error" in static.compare({}, {}, errors)[0].text


def test_without_nvcc_the_output_says_so(csrc, monkeypatch, command, capsys):
    """And lines of csrc/ stay in the baseline."""
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    cuda = launch(op="csrc/copy.cu", case="nvcc 13.0", form="", dtype="")
    assert command([launch(), cuda], "--update", "--reason", "first numbers") == 0
    capsys.readouterr()
    assert command([launch()], "--check") == 0
    assert "1 files csrc/*.cu were not compiled: there is no nvcc" in capsys.readouterr().out
    command([launch(registers=41)], "--update", "--reason", "another")
    assert command([launch(registers=41)], "--check") == 0
    baseline = json.loads(static.baseline_file(csrc / "static").read_text())
    assert [static.release_of(key) for key in baseline["kernels"]] == ["nvcc 13.0", None]


def test_cuda_kernels_are_compared_within_a_release_of_nvcc(csrc, monkeypatch, command, capsys):
    def compiled_by(release, spills):
        nvcc = build.Nvcc(Path("nvcc"), release, release, build.ARCHITECTURES)
        row = launch(op="csrc/copy.cu", case=f"nvcc {release}", form="", dtype="", spill_bytes=spills)
        monkeypatch.setattr(build, "find_nvcc", lambda: nvcc.path)
        monkeypatch.setattr(build.Nvcc, "of", lambda path: nvcc)
        monkeypatch.setattr(static, "cuda_facts", lambda *args, **_: ([row], {}))

    compiled_by("13.0", 0)
    assert command([launch()], "--update", "--reason", "first numbers") == 0
    compiled_by("12.8", 64)
    capsys.readouterr()
    assert command([launch()], "--check") == 0
    assert "has lines of nvcc 13.0, this is nvcc 12.8: not compared" in capsys.readouterr().out
    assert command([launch()], "--update", "--reason", "an earlier release") == 0
    for release, spills, status in (("12.8", 64, 0), ("12.8", 65, 1), ("13.0", 0, 0), ("13.0", 64, 1)):
        compiled_by(release, spills)
        assert command([launch()], "--check") == status, (release, spills)


# the real thing


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_baselines_are_committed(version):
    file = static.baseline_file(BASELINES, version)
    baseline = json.loads(file.read_text())
    assert baseline["triton"] == version and baseline["reasons"] and baseline["roofline"]
    assert {f"{key.split(' / ')[0]} {key.split(' / ')[1]}" for key in baseline["kernels"]} >= {
        f"sm_{capability} {op}"
        for capability in static.CAPABILITIES
        for op in static.compiled_ops()
        if aot.forms(BY_NAME[op], capability)
    }
    assert file.stat().st_size < 250_000
    without_backward = {
        "adam_update",
        "decode_attention",
        "muon_momentum",
        "muon_apply",
        "polar_express",
        "quantise_weight",
    }
    backward = {key.split(" / ")[0] for key in baseline["roofline"] if key.endswith("backward")}
    assert backward == set(static.compiled_ops()) - without_backward


def test_the_kernels_are_as_in_the_baseline(capfd):
    if not static.baseline_file(BASELINES).exists():
        pytest.skip(f"no baseline for Triton {triton.__version__}")
    assert static.main(["--check"]) == 0, capfd.readouterr().out


MUTATIONS = {  # of adam_update
    "spill_bytes": Edit(r'"BLOCK": \d+, "num_warps": \d+', '"BLOCK": 8192, "num_warps": 2', within="_config"),
    "wide_loads": Edit(r"@triton\.jit\n", '@triton.jit(do_not_specialize=["n"])\n', within="_adam_update_kernel"),
}


@pytest.mark.parametrize("counter", MUTATIONS)
def test_a_kernel_made_worse_is_caught(tmp_path, counter):
    """A changed source, compiled and compared with the committed baseline."""
    if not static.baseline_file(BASELINES).exists():
        pytest.skip(f"no baseline for Triton {triton.__version__}")
    for name in ("csrc", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "bench" / "projection").mkdir(parents=True)
    names = ("__init__.py", "aot.py", "kernel_model.py", "law.py", "projection/__init__.py", "projection/machine.py")
    for name in names:
        shutil.copy(ROOT / "bench" / name, tmp_path / "bench" / name)
    source = tmp_path / "kernels" / "adam_update.py"
    source.write_text(edited(source.read_text(), [MUTATIONS[counter]]))
    kernels, errors = static.facts(["adam_update"], [120], root=tmp_path, folder=tmp_path / "cache")
    assert not errors
    baseline = json.loads(static.baseline_file(BASELINES).read_text())["kernels"]
    mine = {key: row for key, row in baseline.items() if key.startswith("sm_120 / adam_update / ")}
    changes = static.compare(mine, static.table(kernels), {})
    assert len(changes) == len(mine) and all(c.kind == "worse" and f"{counter} " in c.text for c in changes), changes
