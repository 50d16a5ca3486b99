"""rope_qk_norm against float64: switches, odd head counts and sizes, layouts of gradients, positions per row,
mutations."""

import pytest
import torch

import kernels.rope_qk_norm as module
from bench.law import double
from kernels.rope_qk_norm import rope_qk_norm, rope_qk_norm_cost, rope_qk_norm_ref
from tests.harness import DEVICE, LAYOUTS, RecordOps, check_op, guarded, mutant, randn
from tests.mutations import Edit, mutations

DTYPES = (torch.bfloat16, torch.float32)
SHAPES = ((2, 5, 4, 2, 16), (1, 3, 3, 3, 20), (3, 2, 1, 1, 128), (2, 4, 12, 12, 8), (1, 1, 2, 1, 64))  # B, T, H, G, D
FACTOR = 1.25
NO_GRAD = ("cos", "sin")
triton_op = rope_qk_norm.backends["triton"]


def inputs(form, shape, dtype=torch.float32, seed=0, **changes):
    return rope_qk_norm.forms[form](randn(seed, dtype), *shape) | changes


def check(form, shape, dtype=torch.float32, op=rope_qk_norm, changes=(), **options):
    factor = FACTOR if shape[-1] >= 16 else 2.0  # the docstring says why short heads are less exact
    return check_op(op, inputs(form, shape, dtype, **dict(changes)), no_grad=NO_GRAD, factor=factor, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", rope_qk_norm.forms)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(form, shape, dtype):
    check(form, shape, dtype)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("rope", [True, False])
def test_switches(rope, norm):
    changes = {"norm": norm} | ({} if rope else {"cos": None, "sin": None})
    check("value embeddings", (2, 3, 4, 2, 16), torch.bfloat16, changes=changes)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("form", rope_qk_norm.forms)
def test_layouts(form, layout):
    check(form, (2, 5, 2, 2, 8), torch.bfloat16, layout=layout)


def test_gradients_as_attention_returns_them():
    """(B, heads, T, D) in memory: read where they are, without a copy."""
    args = inputs("value embeddings", (2, 5, 4, 2, 16))
    leaves = {name: args[name].requires_grad_() for name in ("qkv", "gate_x", "gate_w", "ve")}
    grads = [
        torch.randn(t.shape, device=DEVICE).transpose(1, 2).contiguous().transpose(1, 2) for t in triton_op(**args)
    ]
    want = torch.autograd.grad(rope_qk_norm_ref(**args), list(leaves.values()), grads)
    got = torch.autograd.grad(triton_op(**args), list(leaves.values()), grads)
    for name, a, b in zip(leaves, got, want):
        torch.testing.assert_close(a, b, msg=name)


CUTS = {
    "one layer of a gather for all": ((3, 5, 3, 2, 16), lambda wide: wide.unbind(2)[1]),
    "the middle of longer rows": ((3, 9, 2, 16), lambda wide: wide[:, 2:7]),
}


def check_value_embeddings(name, op=triton_op):
    """ve as a part of a larger tensor: forward and backward. Upstream gradients do not depend on how an output was
    rounded."""
    shape, cut = CUTS[name]
    args = inputs("value embeddings", (3, 5, 4, 2, 16))
    wide = guarded(randn(3, torch.float32)(*shape)).requires_grad_()
    args["ve"] = cut(wide)
    assert not args["ve"].is_contiguous()
    leaves = {"wide": wide} | {name: args[name].requires_grad_() for name in ("gate_x", "gate_w", "qkv")}
    results = []
    for function in (op, rope_qk_norm_ref):
        out = function(**args)
        upstream = [randn(seed, torch.float32)(*t.shape) for seed, t in enumerate(out, 10)]
        results.append([*out, *torch.autograd.grad(out, list(leaves.values()), upstream)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", CUTS)
def test_value_embeddings_are_read_where_they_are(name):
    check_value_embeddings(name)


def check_gate(J, gate_range, dtype, op=rope_qk_norm):
    """Of one layer's row of a bank, from the first channels of a wider tensor, kept in place."""
    args = inputs("value embeddings", (2, 4, 3, 3, 16), dtype, gate_range=gate_range)
    args |= {"gate_x": randn(5, dtype)(2, 4, J), "gate_w": 0.3 * randn(6, dtype)(3, J)}
    # PyTorch's product of one column sums in another order where rows are apart
    check_op(op, args, no_grad=NO_GRAD, factor=FACTOR, layout="rows apart" if J > 1 else "contiguous")
    wide, bank = guarded(randn(7, dtype)(2, 4, J + 9)), guarded(randn(8, dtype)(2, 3, J))
    args |= {"gate_x": wide[..., :J], "gate_w": bank[1]}
    with RecordOps() as record:
        v = op.backends["triton"](**args).v
    torch.testing.assert_close(v.double(), rope_qk_norm_ref(**double(args)).v, rtol=1e-2, atol=1e-2)
    ((_, given, *_),) = record.calls
    assert given[3].data_ptr() == wide.data_ptr() and given[4].data_ptr() == bank[1].data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("J, gate_range", [(1, 3.0), (12, 2.0), (16, 3.0), (31, -0.5), (32, 3.0)])
def test_the_gate(J, gate_range, dtype):
    check_gate(J, gate_range, dtype)


def test_a_gate_that_is_open_or_shut():
    args = inputs("value embeddings", (1, 3, 2, 2, 16))
    for size in (40.0, -40.0, 200.0, -200.0):
        gate_x, gate_w = torch.full((1, 3, 1), size, device=DEVICE), torch.ones(2, 1, device=DEVICE)
        result = check_op(rope_qk_norm, args | {"gate_x": gate_x, "gate_w": gate_w}, no_grad=NO_GRAD, factor=FACTOR)
        assert all(t.isfinite().all() for t in result.values())
        if size < 0:
            assert torch.equal(result["v"].flatten(2), args["qkv"][..., 64:])


def test_the_reference_s_gate_is_a_product_and_a_sigmoid():
    for dtype in DTYPES:
        args = inputs("value embeddings", (2, 5, 4, 2, 16), dtype)
        gate = 3.0 * torch.sigmoid(args["gate_x"] @ args["gate_w"].T)
        v = args["qkv"][..., -32:].unflatten(-1, (2, 16)).float() + gate.float().unsqueeze(-1) * args["ve"].float()
        assert torch.equal(rope_qk_norm_ref(**args).v, v.to(dtype))


@pytest.mark.parametrize("changes", [{"scale": -0.7}, {"scale": 3.0, "eps": 0.5}], ids=str)
def test_scale_and_eps(changes):
    check("value embeddings", (2, 3, 4, 2, 16), changes=changes)
    args = inputs("plain", (1, 3, 2, 2, 16))
    del args["scale"]  # 1
    check_op(rope_qk_norm, args, no_grad=NO_GRAD, factor=FACTOR)


def test_slices_and_expanded_batches():
    """The beginning of longer rows, and one row for the whole batch."""
    args = inputs("plain", (2, 3, 4, 2, 16))
    longer = torch.randn(2, 7, 128, device=DEVICE)
    for qkv in (longer[:, :3], longer[:1, :3].expand(2, 3, 128)):
        for got, want in zip(triton_op(**args | {"qkv": qkv}), rope_qk_norm_ref(**args | {"qkv": qkv})):
            torch.testing.assert_close(got, want)


def test_the_widest_and_the_most_heads():
    check("value embeddings", (1, 2, 2, 1, 256), torch.bfloat16)
    check("plain", (1, 2, 66, 62, 8))


@pytest.mark.parametrize("one", ["q", "k", "v"])
def test_gradient_of_one_output_alone(one):
    check("value embeddings" if one == "v" else "plain", (1, 3, 2, 1, 16), upstream_of=(one,))


def test_rows_and_heads_more_than_two_billion_elements_apart():
    """Memory that is only asked for."""
    apart = 2**29
    args = inputs("value embeddings", (1, 5, 2, 2, 16), torch.bfloat16)
    far = torch.empty(4 * apart + 96, dtype=torch.bfloat16, device=DEVICE)
    qkv = far.as_strided((1, 5, 96), (0, apart, 1)).copy_(args["qkv"])
    ve = torch.empty(5 * apart, dtype=torch.bfloat16, device=DEVICE).as_strided((1, 5, 2, 16), (0, 16, 4 * apart, 1))
    ve.copy_(args["ve"])
    for got, want in zip(triton_op(**args | {"qkv": qkv, "ve": ve}), triton_op(**args)):
        assert torch.equal(got, want)


def test_rows_at_positions_of_their_own():
    args = inputs("plain", (3, 2, 4, 2, 16))
    angle = torch.randn(3, 2, 8, device=DEVICE)
    args |= {"cos": angle.cos(), "sin": angle.sin()}
    check_op(rope_qk_norm, args, no_grad=NO_GRAD, factor=FACTOR)
    shared = args | {"cos": args["cos"][:1], "sin": args["sin"][:1]}
    check_op(rope_qk_norm, shared, no_grad=NO_GRAD, factor=FACTOR)


@pytest.mark.parametrize("form", rope_qk_norm.forms)
def test_torch_compile_and_opcheck(form):
    check(form, (2, 3, 2, 2, 8), torch.bfloat16, compiled=True, opcheck=True)


@pytest.mark.parametrize("shape", [(0, 4, 2, 2, 8), (2, 0, 2, 2, 8)], ids=str)
def test_empty(shape):
    result = check("value embeddings", shape)
    assert result["q"].numel() == 0 and result["dqkv"].numel() == 0


def test_zero_heads_have_finite_gradients():
    args = inputs("plain", (1, 3, 2, 1, 8))
    args["qkv"][:, 1] = 0
    result = check_op(rope_qk_norm, args, no_grad=NO_GRAD, factor=FACTOR)
    assert not result["q"][:, 1].any() and result["dqkv"].isfinite().all()


def test_the_projection_is_not_kept():
    args = inputs("plain", (2, 3, 2, 2, 8), qkv=torch.randn(2, 3, 48, device=DEVICE, requires_grad=True))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = triton_op(**args)
    kept = {t.data_ptr() for t in saved}
    assert args["qkv"].data_ptr() not in kept and {out.q.data_ptr(), out.k.data_ptr()} <= kept
    assert out.v.data_ptr() not in kept


def test_rotation_depends_on_the_difference_of_positions():
    from core.layers import rope_tables

    cos, sin = rope_tables(64, 16, torch.device("cpu"))
    q, k = torch.randn(16).double(), torch.randn(16).double()
    packed = torch.cat((q, k, k)).expand(1, 64, 48)
    out = rope_qk_norm_ref(packed, cos, sin, heads=1, kv_heads=1, norm=False)
    turned_q, turned_k = out.q[0, :, 0], out.k[0, :, 0]
    torch.testing.assert_close(turned_q[40] @ turned_k[30], turned_q[15] @ turned_k[5], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(64), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(turned_q[40] @ turned_k[30], turned_q[40] @ turned_k[20])


GOOD = dict(qkv=torch.ones(2, 3, 32), heads=2, kv_heads=1)
GATED = dict(gate_x=torch.ones(2, 3, 12), gate_w=torch.ones(1, 12), ve=torch.ones(2, 3, 1, 8))


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(qkv=torch.ones(2, 3, 33)), r"qkv is \(2, 3, 33\)"),
        (dict(qkv=torch.ones(6, 32)), "qkv is"),
        (dict(qkv=torch.ones(2, 3, 12)), "3 channels"),
        (dict(qkv=torch.ones(2, 3, 32).half()), "float16"),
        (dict(cos=torch.ones(3, 4)), "cos goes with sin"),
        (dict(scale=0.0), "scale is 0"),
        (dict(gate_x=torch.ones(2, 3, 12)), "gate_x with gate_w and ve"),
        (dict(gate_x=torch.ones(2, 3, 12), ve=torch.ones(2, 3, 1, 8)), "gate_x with gate_w and ve"),
        (dict(gate_w=torch.ones(1, 12), ve=torch.ones(2, 3, 1, 8)), "gate_x with gate_w and ve"),
        (dict(cos=torch.ones(4, 4), sin=torch.ones(4, 4)), r"cos is \(4, 4\)"),
        (dict(cos=torch.ones(3, 4).bfloat16(), sin=torch.ones(3, 4).bfloat16()), "cos is .*bfloat16"),
        (GATED | dict(gate_x=torch.ones(2, 2, 12)), r"gate_x is \(2, 2, 12\)"),
        (GATED | dict(gate_x=torch.ones(2, 3, 33)), r"gate_x is \(2, 3, 33\) .*1 <= J <= 32"),
        (GATED | dict(gate_x=torch.ones(2, 3, 0)), "1 <= J <= 32"),
        (GATED | dict(gate_w=torch.ones(2, 12)), r"gate_w is \(2, 12\)"),
        (GATED | dict(gate_w=torch.ones(1, 11)), r"gate_w is \(1, 11\)"),
        (GATED | dict(gate_w=torch.ones(1, 12).bfloat16()), "gate_w is .*bfloat16"),
        (GATED | dict(ve=torch.ones(2, 3, 1, 9)), r"ve is \(2, 3, 1, 9\)"),
    ],
)
@pytest.mark.parametrize("backend", rope_qk_norm.backends)
def test_bad_calls_are_refused(backend, change, says):
    with pytest.raises(ValueError, match=says):
        rope_qk_norm.checked(backend)(**{**GOOD, **change})


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(qkv=torch.ones(2, 3, 16)), "even size from 8 to 256, not 4"),
        (dict(qkv=torch.ones(2, 3, 32).double()), "float64"),
        (dict(qkv=torch.ones(1, 1, 300 * 8), heads=200, kv_heads=50), "not 250"),
    ],
)
def test_the_kernel_refuses_what_it_cannot_take(change, says):
    rope_qk_norm.checked("ref")(**{**GOOD, **change})
    with pytest.raises(ValueError, match=says):
        rope_qk_norm.checked("triton")(**{**GOOD, **change})


def test_cost():
    shape = (1, 10, 2, 1, 8)
    assert rope_qk_norm_cost(shape, torch.bfloat16)[1] == 10 * 2 * 32 * 2
    assert rope_qk_norm_cost(shape, torch.bfloat16, backward=True)[1] == 10 * (2 * 32 + 24) * 2
    assert rope_qk_norm_cost(shape, torch.bfloat16, "value embeddings")[1] == 10 * (2 * 32 + 8 + 12) * 2
    backward = rope_qk_norm_cost(shape, torch.bfloat16, "value embeddings", backward=True)
    assert backward[1] == 10 * (2 * 32 + 24 + 2 * (8 + 12)) * 2


MUTATIONS = {
    "the rotation goes the other way": {
        "z1 * cos + z2 * sin, z2 * cos - z1 * sin": "z1 * cos - z2 * sin, z2 * cos + z1 * sin"
    },
    "the gradient is rotated forward": {
        "r1 * cos - r2 * sin, r1 * sin + r2 * cos": "r1 * cos + r2 * sin, r2 * cos - r1 * sin"
    },
    "the mean is over half a head": {
        "tl.sum(r1 * r1 + r2 * r2, axis=1) / D": "tl.sum(r1 * r1 + r2 * r2, axis=1) / HALF"
    },
    "eps is in the wrong place": {"/ D + eps)  #": "/ D) + eps  #"},
    "the scale is forgotten backward": {"g1, g2 = scale * g1, scale * g2": "pass"},
    "the mean is dropped backward": {"g1 - x1 * mean": "g1", "g2 - x2 * mean": "g2"},
    "heads of k take the row of q": {"offs - H * D, y1": "offs - H * D + D, y1"},
    "masks of heads are gone": {
        "(offs_h < H + G)[:, None] & mask_d[None, :]": "(offs_h < BLOCK_H)[:, None] & mask_d[None, :]"
    },
    "masks of channels are gone": {"mask_d = offs_d < HALF": "mask_d = offs_d < BLOCK_D"},
    "all rows have the angles of the first token": {
        "b * stride_sin_b + t * stride_sin_t + offs_d": "b * stride_sin_b + offs_d"
    },
    "the gate is one": {"v1 + gate * ve1, v2 + gate * ve2": "v1 + ve1, v2 + ve2"},
    "the gradient of the gate takes half a head": {"dv1 * ve1 + dv2 * ve2": "dv1 * ve1"},
    "dve has no gate": {"(gate * dv2)": "dv2"},
    "the gate has no range": {"gate = (gate_range * sigmoid)": "gate = (3.0 * sigmoid)"},
    "the gate's slope is left out": {"* (gate_range * sigmoid * (1.0 - sigmoid))": "* gate_range"},
    "the gate reads one channel less": {"mask=offs_j < J, other=0.0": "mask=offs_j < J - 1, other=0.0"},
    "the gate's channels have no batch": {"gate_x_ptr + b * stride_gate_x_b + t": "gate_x_ptr + t"},
    "rows of the gate's weights follow each other": {"offs_h[:, None] * stride_w": "offs_h[:, None] * J"},
    "heads take each other's gate": {"w_ptr + offs_h[:, None]": "w_ptr + ((offs_h + 1) % G)[:, None]"},
    "dgate_x is of the sigmoid": {"tl.sum(dpre[:, None] * gate_w": "tl.sum(sigmoid[:, None] * gate_w"},
    "rows of dgate_x follow each other": {"dgate_x_ptr + token * stride_dgate_x": "dgate_x_ptr + token * J"},
    "dgate_w has the channels of another token": {"gate_x.flatten(0, 1))": "gate_x.flatten(0, 1).roll(1, 0))"},
    "dk is dropped": {"dq1 + dk1, dq2 + dk2": "dq1, dq2"},
    "dv is one": {
        "dv1, dv2 = _two_halves(dv_ptr, offs_dv, HALF, is_v)": "dv1, dv2 = _two_halves(dv_ptr, offs_dv * 0, HALF, is_v)"
    },
    "sin has the stride of cos": {"t * stride_sin_t": "t * stride_cos_t"},
    "the scale is a constant": {"scale * (r1 * rstd[:, None])": "1.2 * (r1 * rstd[:, None])"},
    "eps is a constant": [Edit("scale, gate_range, eps,", "scale, gate_range, EPS,", within="_rope_qk_norm_fwd")],
    "ve has a stride of its own only forward": [
        Edit(
            r"_two_halves\(ve_ptr, offs_ve,",
            "_two_halves(ve_ptr, token * G * D + offs,",
            within="_rope_qk_norm_bwd_kernel",
        )
    ],
    "batches of ve follow each other": [
        Edit(r"b \* stride_ve_b", "b * T * stride_ve_t", within="_rope_qk_norm_fwd_kernel")
    ],
    "batches of ve follow each other backward": [
        Edit(r"b \* stride_ve_b", "b * T * stride_ve_t", within="_rope_qk_norm_bwd_kernel")
    ],
    "a stride is forgotten": {"t * stride_dq_t + wide_h * stride_dq_h": "t * (H * D) + wide_h * stride_dq_h"},
}
# one for each class of failure; the others run by `pytest -m mutations`
CLASSES = [
    "the gradient is rotated forward",
    "the mean is dropped backward",
    "heads of k take the row of q",
    "masks of channels are gone",
    "dk is dropped",
    "the gate's slope is left out",
    "rows of the gate's weights follow each other",
    "dgate_w has the channels of another token",
    "sin has the stride of cos",
    "the scale is a constant",
    "ve has a stride of its own only forward",
    "batches of ve follow each other",
    "batches of ve follow each other backward",
]


@pytest.mark.skipif(DEVICE == "cuda", reason="a broken kernel may end the CUDA context of the other tests")
@pytest.mark.parametrize("name", mutations(MUTATIONS, always=CLASSES))
def test_a_broken_kernel_is_noticed(name, tmp_path):
    broken = mutant(module, MUTATIONS[name], tmp_path).rope_qk_norm
    with pytest.raises(AssertionError):
        for layout in LAYOUTS[:2]:
            check("value embeddings", (2, 5, 3, 2, 12), torch.bfloat16, op=broken, layout=layout)
        small = inputs("plain", (1, 3, 2, 1, 8))
        check_op(broken, small | {"qkv": small["qkv"] * 1e-4}, no_grad=NO_GRAD, factor=FACTOR)
        check("plain", (1, 3, 2, 1, 16), op=broken, changes={"scale": 3.0, "eps": 0.5})
        check_value_embeddings("the middle of longer rows", broken.backends["triton"])
        check_gate(11, 2.0, torch.float32, broken)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_a_copy_that_is_not_broken_passes(tmp_path):
    same = mutant(module, {"MAX_HEAD = 8, 256": "MAX_HEAD = 8, 254"}, tmp_path).rope_qk_norm
    check("value embeddings", (2, 5, 3, 2, 12), torch.bfloat16, op=same)
