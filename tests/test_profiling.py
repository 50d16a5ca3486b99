"""The profiled window, and what a profile leaves behind."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

import train
from core import profiling
from core.communication import World
from core.profiling import StepProfile, is_product, kernel_seconds, longest_quiet_steps, memory_summary
from tests.test_train import events, losses, run

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "n, first, stop, interrupted, expected",
    [
        (3, 11, 100, (), (11, 14)),
        (3, 11, 100, (11,), (11, 14)),  # due at the window's first step is fine
        (3, 11, 100, (12,), (12, 15)),
        (3, 11, 100, (12, 14, 16), (16, 19)),
        (3, 11, 18, (12, 14, 16), (12, 14)),  # none has room: the longest, the earliest of equals
        (3, 11, 12, (), (11, 12)),
        (3, 11, 11, (), (11, 11)),
        (3, 11, 5, (), (11, 11)),
        (0, 11, 100, (), (11, 11)),
        (2, 4, 9, range(100), (4, 5)),
    ],
)
def test_profiled_steps(n, first, stop, interrupted, expected):
    assert longest_quiet_steps(n, first, stop, lambda step: step in interrupted) == range(*expected)


def test_files_of_a_profile(tmp_path):
    (tmp_path / "run").mkdir()
    profile = StepProfile(World(1, 2, CPU), tmp_path / "run", {"aten::earlier": 1.0})
    assert profile.shares()["profile_files"] == []
    a = torch.ones(512, 512)
    with profile:
        b = [a @ a for _ in range(4)]
        del b[1:]
    shares = profile.shares()
    assert shares["profile_files"] == ["profile/memory_rank1.json", "profile/trace_rank1.json.gz"]
    assert max(shares["time_by_op"], key=shares["time_by_op"].get) == "aten::mm" and shares["non_matmul_share"] < 0.5
    memory = json.loads((tmp_path / "run/profile/memory_rank1.json").read_text())
    assert memory["bytes_by_op"]["aten::mm"] == 4 * 2**20
    # threads of the process that runs the tests may allocate a few bytes meanwhile
    assert 0 <= memory["peak_bytes"] - 4 * 2**20 < 1024
    assert 0 <= memory["timeline"][-1][1] - 2**20 < 1024
    trace = json.loads(gzip.decompress((tmp_path / "run/profile/trace_rank1.json.gz").read_bytes()))
    assert any(e.get("name") == "aten::mm" for e in trace["traceEvents"])


def ran(name, us, device=DeviceType.CUDA, **options):
    return FunctionEvent(0, name, 0, 100.0, 100.0 + us, device_type=device, use_device="cuda", **options)


def test_what_ran_on_a_gpu_counts_once(tmp_path, monkeypatch):
    """Events as a profile of CPU and GPU has them: an op, its kernel, and an annotation on both sides around it."""
    long = "void at::native::vectorized_elementwise_kernel<4, at::native::" + "x" * 100
    on_cpu = [ran("aten::mm", 40, DeviceType.CPU), ran("## Call CompiledFxGraph f1 ##", 900, DeviceType.CPU)]
    around = [ran("## Call CompiledFxGraph f1 ##", 800, is_user_annotation=True)]
    kernels = [ran("nvjet_hsh_128x256_64x4", 300), ran("_relu2_gemm_kernel", 100), ran(f"{long}<int>", 40)]
    kernels += [ran(f"{long}<float>", 10), ran("_row_kernel", 30), ran("Memset (Device)", 20)]
    assert kernel_seconds(on_cpu + around + kernels).total() == pytest.approx(500e-6)
    profile = StepProfile(World(0, 1, CPU), tmp_path, kernel_seconds(on_cpu + around + kernels))
    shares = profile.shares()
    assert shares["non_matmul_share"] == pytest.approx(0.2)
    assert shares["time_by_op"] == {
        "nvjet_hsh_128x256_64x4": 0.6,
        "_relu2_gemm_kernel": 0.2,
        long[: profiling.NAME_WIDTH]: 0.1,
        "_row_kernel": 0.06,
        "Memset (Device)": 0.04,
    }


@pytest.mark.parametrize(
    "name",
    [
        "aten::mm",
        "aten::scaled_dot_product_attention",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_128x2_tn_align8>(Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, false>",
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 64, 64>>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3i_128x128x128_4x1x1_kernel0_0",
        "triton_tem_fused_flex_attention_7",
    ],
)
def test_products_are_known_by_the_names_of_libraries(name):
    assert is_product(name)


def test_products_of_our_own_are_known_and_nothing_else_is():
    names = {
        name
        for path in (Path(profiling.__file__).parent.parent / "kernels").glob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M)
    }
    products = {"_gemm_kernel", "_relu2_gemm_kernel", "_fp8_relu2_kernel"}
    products |= {f"_attention_{part}_kernel" for part in ("fwd", "dq", "dkv")}
    assert len(names) > 10 and {name for name in names if is_product(name)} == products
    for name in ("aten::copy_", "triton_red_fused_add_mul_3", "void at::native::reduce_kernel<512>", "Memcpy DtoH"):
        assert not is_product(name)


def test_a_failed_window_leaves_no_files_and_no_profiler(tmp_path):
    profile = StepProfile(World(0, 1, CPU), tmp_path, {})
    with pytest.raises(KeyError), profile:
        raise KeyError
    assert profile.shares() == {} and not any((tmp_path / "profile").iterdir())
    with profile:
        torch.ones(3) + 1
    assert profile.shares()


def test_long_timelines_are_thinned_and_keep_the_peak():
    sizes = [i % 977 for i in range(5000)]
    trace = {
        "traceEvents": [{"name": "[memory]", "ts": i, "args": {"Total Allocated": n}} for i, n in enumerate(sizes)]
    }
    memory = memory_summary(trace, {"a": 3, "b": -3})
    assert len(memory["timeline"]) == 500 and max(n for _, n in memory["timeline"]) == memory["peak_bytes"] == 976
    assert memory["bytes_by_op"] == {"a": 3}
    assert memory_summary({"traceEvents": []}, {})["timeline"] == []


def test_profiling_leaves_the_losses_alone_and_is_off_the_clock(tiny, tmp_path, capsys):
    every = ["--eval-every", "100", "--save-every", "14", "--sample-every", "100", "--steps", "17"]
    plain = run(tiny, tmp_path / "plain", *every)
    out = run(tiny, tmp_path / "run", *every, "--profile", "4")
    assert "note: 3 of 4 steps are profiled" in capsys.readouterr().out  # 11 to 13: 14 saves, 14 to 16 come later
    assert losses(out) == losses(plain)
    summaries = [json.loads((d / "summary.json").read_text()) for d in (plain, out)]
    assert [s["counted_steps"] for s in summaries] == [6, 3]
    assert "`profile/trace.json.gz`" in (out / "report.md").read_text()
    train.main(["--resume", str(out / "checkpoints" / "step_000014"), "--profile", "1"])
    assert json.loads((out / "summary.json").read_text())["counted_steps"] == 2 + 0 and losses(out) == losses(plain)
    assert len(events(out, "resume")) == 1
