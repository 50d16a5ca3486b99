"""embedding against float64: every pattern of tokens, parts, odd shapes, sums over micro-steps, mutations."""

import pytest
import torch
import torch.nn.functional as F

import kernels.embedding as module
from bench.law import poisoned_allocations
from kernels.embedding import embedding, embedding_cost, embedding_ref
from kernels.tile import launch
from tests.harness import DEVICE, LAYOUTS, Failed, RecordOps, check_op, kept, mutant, randn, unharmed
from tests.mutations import Edit, mutations

DTYPES = (torch.bfloat16, torch.float32)
FACTOR = 1.25  # sums in fp32, and one rounding
NO_GRAD = ("dw_sum",)
triton_op = embedding.backends["triton"]
ROWS = module._config(64, torch.float32, (9, 0))["BLOCK_M"]
SHAPES = ((5, 3, 32), (70, 12, 64), (200, 300, 24), (37, 9, 132), (1, 1, 4), (33, 2, 768), (50, 7, 1028))  # M, V, N

TOKENS = {
    "all the same": torch.full((5 * ROWS + 3,), 4),
    "all different": torch.randperm(6 * ROWS + 1, generator=torch.Generator().manual_seed(0)),
    "a run ends with a program's rows": torch.tensor([2] * ROWS + [3] * ROWS + [5] * 2),
    "runs cross borders": torch.tensor(
        [0] * (ROWS - 1) + [1] * 2 + [2] * (2 * ROWS) + [3] + [4] * (3 * ROWS - 1) + [6]
    ),
    "a run of all rows but one": torch.tensor([0] + [1] * (4 * ROWS)),
    "one row": torch.tensor([5]),
    "every other": torch.arange(4 * ROWS) % 2,
    "the last row of the table": torch.full((2 * ROWS,), 9 * ROWS - 1),
}


def inputs(form, shape, dtype=torch.float32, seed=0, **changes):
    return embedding.forms[form](randn(seed, dtype), *shape) | changes


def check(form, shape, dtype=torch.float32, op=embedding, changes=(), **options):
    return check_op(op, inputs(form, shape, dtype, **dict(changes)), no_grad=NO_GRAD, factor=FACTOR, **options)


def check_tokens(name, form, dtype, op=embedding):
    tokens = TOKENS[name]
    shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))].to(DEVICE)
    check(form, (len(tokens), 9 * ROWS, 24), dtype, op, {"idx": shuffled})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", embedding.forms)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(form, shape, dtype):
    result = check(form, shape, dtype)
    assert ("dw" in result) == (form == "plain") != ("dw_sum" in result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", embedding.forms)
@pytest.mark.parametrize("name", TOKENS)
def test_patterns_of_tokens(name, form, dtype):
    check_tokens(name, form, dtype)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(layout):
    for parts in (1, 3):
        check("plain", (40, 12, 33), torch.bfloat16, changes={"parts": parts}, layout=layout)


@pytest.mark.parametrize("form", embedding.forms)
def test_torch_compile_and_opcheck(form):
    check(form, (40, 7, 32), torch.bfloat16, compiled=True, opcheck=True)


@pytest.mark.parametrize("form", embedding.forms)
def test_empty(form):
    result = check(form, (0, 7, 32))
    assert result["y0"].numel() == 0
    if form == "plain":
        assert not result["dw"].any()
    else:
        assert torch.equal(result["dw_sum"], inputs(form, (0, 7, 32))["dw_sum"])


def test_tokens_of_rows():
    idx = torch.randint(0, 9, (2, 3, 20), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for tokens in (idx, idx.transpose(0, 2), idx[:, :1].expand(2, 3, 20), idx[0, 0, 0]):
        result = check("parts", (1, 9, 36), changes={"idx": tokens, "parts": 3})
        assert result["y2"].shape == (*tokens.shape, 12)


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_the_parts_are_those_of_pytorch_s_gather(parts):
    args = inputs("plain", (30, 9, 28), torch.bfloat16)
    want = F.embedding(args["idx"], args["w"]).unflatten(-1, (parts, -1))
    for op in (embedding_ref, triton_op):
        got = op(**args, parts=parts)
        assert len(got) == parts and all(torch.equal(t, want[:, i]) for i, t in enumerate(got))
        assert len({t.untyped_storage().data_ptr() for t in got}) == 1  # one gather


def test_the_reference_without_a_sum_is_pytorch_s():
    args = inputs("plain", (60, 9, 28))
    head = randn(1, torch.float32)(60, 28)
    grads = []
    for function in (F.embedding, lambda idx, w: torch.cat(embedding_ref(idx, w, parts=4), dim=-1)):
        w = args["w"].detach().clone().requires_grad_()
        grads += torch.autograd.grad(function(args["idx"], w), w, head)
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", embedding.backends)
def test_micro_steps_add_to_one_sum(name, backend, monkeypatch):
    """Which exists before the first of them, and after them has what one large step has; without a copy of it (but for
    a backend for debugging)."""
    V, N, parts = 11, 24, 2
    batches = [inputs("plain", (50, V, N), seed=seed)["idx"] for seed in range(3)]
    w = randn(5, torch.float32)(V, N).requires_grad_()
    dw_sum = kept(torch.ones(V, N, device=DEVICE))

    launched = []
    monkeypatch.setattr(
        module, "launch", lambda kernel, *args, **options: launched.append(args) or launch(kernel, *args, **options)
    )

    def step(idx, dw_sum):
        first, second = embedding.backends[name](idx, w, parts=parts, dw_sum=dw_sum)
        return (first * second.cos()).sum()

    torch.compiler.reset()
    step = torch.compile(step, fullgraph=True, dynamic=False, backend=backend) if backend else step
    losses = [step(idx, dw_sum) for idx in batches]  # all forwards come first: saved, the sum would be stale
    for loss in losses:
        loss.backward()
    unharmed(dw_sum)
    assert w.grad is None
    if name == "triton" and backend != "aot_eager":
        found = {t.untyped_storage().data_ptr() for _, *args in launched for t in args if torch.is_tensor(t)}
        assert dw_sum.untyped_storage().data_ptr() in found
    wide = w.detach().double().requires_grad_()
    first, second = F.embedding(torch.cat(batches), wide).chunk(2, dim=-1)
    (want,) = torch.autograd.grad((first * second.cos()).sum(), wide)
    torch.testing.assert_close(dw_sum.double(), want + 1, rtol=1e-5, atol=1e-5)


def test_a_part_that_nothing_used_costs_nothing():
    check("parts", (40, 9, 36), changes={"parts": 3}, upstream_of=("y1",))
    args = inputs("parts", (40, 9, 36), parts=3, dw_sum=torch.zeros(9, 36, device=DEVICE))
    args["w"].requires_grad_()
    with RecordOps() as record:
        triton_op(**args)[1].sum().backward()
    ((_, (_, grads, dw_sum), *_),) = record.calls
    assert [g is None for g in grads] == [True, False, True] and dw_sum is args["dw_sum"]
    assert not args["dw_sum"][:, :12].any() and args["dw_sum"][:, 12:24].any() and not args["dw_sum"][:, 24:].any()


def test_rows_without_a_token_are_not_touched():
    dw_sum = torch.full((50, 32), torch.nan, device=DEVICE)
    idx = torch.tensor([7, 3, 7, 49, 0] * 9, device=DEVICE)
    dw_sum[idx] = 0
    w = randn(0, torch.float32)(50, 32).requires_grad_()
    triton_op(idx, w, dw_sum=dw_sum)[0].sum().backward()
    assert dw_sum[idx].isfinite().all() and dw_sum.isnan().all(dim=1).sum() == 46


def check_outside(add=module._add):
    V, N = 5, 16
    idx = torch.tensor([0, 5, -1, 4, 2**31 - 1, 5, -1, 0, -(2**31)] + [7] * (3 * ROWS), device=DEVICE)
    grad, dw_sum = randn(0, torch.float32)(len(idx), N), kept(torch.zeros(V, N, device=DEVICE))
    with poisoned_allocations():
        add(idx, [grad], dw_sum)
    unharmed(dw_sum)
    want = torch.zeros(V, N, device=DEVICE)
    want[0], want[4] = grad[0] + grad[7], grad[3]
    torch.testing.assert_close(dw_sum, want)


@pytest.mark.skipif(DEVICE == "cuda", reason="PyTorch's gather ends the CUDA context")
@pytest.mark.parametrize("name", embedding.backends)
def test_tokens_outside_of_the_table(name):
    """The forward pass refuses them; backward alone would write nothing."""
    for token in (5, -1):
        with pytest.raises(IndexError):
            embedding.checked(name)(torch.tensor([0, token]), torch.ones(5, 16))
    check_outside()


def test_rows_more_than_two_billion_elements_apart():
    """Memory that is only asked for: of the gradient."""
    apart = 2**30
    idx, w = torch.tensor([1, 0, 1], device=DEVICE), torch.ones(2, 32, dtype=torch.bfloat16, device=DEVICE)
    far = torch.empty(2 * apart + 32, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 32), (apart, 1))
    far.copy_(randn(0, torch.bfloat16)(3, 32))
    sums = [torch.zeros(2, 32, device=DEVICE) for _ in range(2)]
    for grad, dw_sum in zip((far, far.contiguous()), sums):
        triton_op(idx, w.requires_grad_(), dw_sum=dw_sum)[0].backward(grad)
    assert torch.equal(*sums)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_a_number_stays_in_its_row():
    args = inputs("sum", (60, 9, 32), idx=torch.arange(60, device=DEVICE) % 5)
    grad = randn(1, torch.float32)(60, 32)
    grad[11], grad[12] = torch.nan, torch.inf  # of tokens 1 and 2
    triton_op(**args | {"w": args["w"].requires_grad_()})[0].backward(grad)
    assert args["dw_sum"][1].isnan().all() and args["dw_sum"][2].isinf().all()
    assert args["dw_sum"][[0, 3, 4, 5]].isfinite().all()


GOOD = dict(idx=torch.zeros(3, dtype=torch.int64), w=torch.ones(5, 12))


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(w=torch.ones(12)), r"w is \(12,\)"),
        (dict(w=torch.ones(5, 0)), "1 <= N"),
        (dict(w=torch.ones(5, 12).half()), "float16"),
        (dict(idx=torch.zeros(3, dtype=torch.int32)), "idx is .*int32 on cpu; expected .*int64"),
        (dict(idx=torch.zeros(3)), "idx is .*float32"),
        (dict(parts=5), "parts is 5; expected a divisor of the 12 columns"),
        (dict(parts=0), "parts is 0"),
        (dict(dw_sum=torch.ones(5, 11)), r"dw_sum is \(5, 11\)"),
        (dict(dw_sum=torch.ones(5, 12).bfloat16()), "dw_sum is .*bfloat16.* float32"),
        (dict(dw_sum=torch.ones(12, 5).T), "dw_sum is .*strides.* contiguous"),
        (dict(dw_sum=torch.ones(5, 12, requires_grad=True)), "dw_sum requires a gradient"),
    ],
)
@pytest.mark.parametrize("backend", embedding.backends)
def test_bad_calls_are_refused(backend, change, says):
    with pytest.raises(ValueError, match=says):
        embedding.checked(backend)(**GOOD | change)


def test_the_kernel_refuses_what_it_cannot_take():
    args = GOOD | {"w": torch.ones(5, 12).double()}
    assert embedding.checked("ref")(**args)[0].dtype == torch.float64
    with pytest.raises(ValueError, match="float64"):
        embedding.checked("triton")(**args)
    assert "not 2147483648" in embedding.backends["triton"].limits((1, 2**31, 8), torch.float32)


def test_cost():
    shape = (10, 4, 8)
    assert embedding_cost(shape, torch.bfloat16) == (0, (10 + 4) * 8 * 2 + 80)
    assert embedding_cost(shape, torch.bfloat16, "plain", True) == (80, (10 + 4) * 8 * 2 + 80)
    assert embedding_cost(shape, torch.bfloat16, "sum", True)[1] == 10 * 8 * 2 + 4 * 8 * 8 + 80
    assert embedding_cost((3, 4, 8), torch.float32, "parts", True)[1] == 3 * 8 * 4 + 3 * 8 * 8 + 24


def test_tokens_of_the_forms_repeat_and_stay_in_the_table():
    idx = inputs("plain", (2000, 500, 4))["idx"]
    assert idx.min() >= 0 and idx.max() < 500 and 100 < len(idx.unique()) < 500


MUTATIONS = {
    "a run that began before is added twice": {"if begins:": "if True:"},
    "a carried run is dropped": {"if goes_on & begins": "if (pid < 0) & goes_on & begins"},
    "the carry is written where it began": [Edit(r"carry_ptr \+ pid", "carry_ptr + 0 * pid")],
    "a carry stops after one program": {"program += 1\n": "program += M\n"},
    "whoever carries on begins, too": {"if goes_on & begins": "if goes_on"},
    "only the first run is carried": {"if goes_on & begins": "if goes_on & (first == 0)"},
    "the sum is overwritten": {"tl.load(dw_row_ptr, mask=mask, other=0.0) + total": "total"},
    "the sum is not cleared": {"            total = tl.zeros((BLOCK_N,), tl.float32)\n": ""},
    "runs are not told apart": {"| (next_token != token)": ""},
    "the last rows are not summed": {
        "end = tl.minimum(first + BLOCK_M, M)": "end = tl.minimum(first + BLOCK_M, M - 1)"
    },
    "rows behind the last are summed": {"end = tl.minimum(first + BLOCK_M, M)": "end = first + BLOCK_M"},
    "the order of rows is forgotten": {"row = tl.load(order_ptr + following)": "row = following.to(tl.int64)"},
    "the first row is not looked up": {"tl.load(order_ptr + first) * stride_dy": "first * stride_dy"},
    "columns behind the last are written": {"mask = offs_n < N": "mask = offs_n < BLOCK_N"},
    "columns of the first block only": {"tl.program_id(1) * BLOCK_N": "0 * BLOCK_N"},
    "rows of the gradient follow each other": {"* stride_dy": "* N"},
    "all parts have the first columns": {"part * width, width": "0, width"},
    "sums are rounded": {"total += dy\n": "total = (total + dy).to(dy_ptr.dtype.element_ty).to(tl.float32)\n"},
    "tokens outside of the table are written": {"if (token >= 0) & (token < V):": "if token < V + 3:"},
    "the gradient is not rounded to the weight": {"dw.to(ctx.dtype)": "dw.to(ctx.dtype) * 1.01"},
    "a part without gradient stops the others": {"            continue\n": "            break\n"},
}
# one for each class of failure; the others run by `pytest -m mutations`
CLASSES = [
    "a carried run is dropped",
    "the carry is written where it began",
    "only the first run is carried",
    "the sum is overwritten",
    "the order of rows is forgotten",
    "rows of the gradient follow each other",
    "columns behind the last are written",
    "tokens outside of the table are written",
]


@pytest.mark.skipif(DEVICE == "cuda", reason="a broken kernel may end the CUDA context of the other tests")
@pytest.mark.parametrize("name", mutations(MUTATIONS, always=CLASSES))
def test_a_broken_kernel_is_noticed(name, tmp_path):
    copy = mutant(module, MUTATIONS[name], tmp_path)
    broken = copy.embedding
    with pytest.raises((Failed, AssertionError)):
        for tokens in TOKENS:
            check_tokens(tokens, "sum", torch.bfloat16, broken)
        check("plain", (40, 12, 33), torch.bfloat16, broken, {"parts": 3}, layout="rows apart")
        check("plain", (40, 12, 530), torch.float32, broken)
        check("parts", (40, 9, 36), op=broken, changes={"parts": 3}, upstream_of=("y1",))
        check_outside(copy._add)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_a_copy_that_is_not_broken_passes(tmp_path):
    same = mutant(module, {"PARTS = 4": "PARTS = 2"}, tmp_path)
    check_tokens("runs cross borders", "sum", torch.bfloat16, same.embedding)
    check_outside(same._add)
