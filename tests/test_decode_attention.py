"""decode_attention against float64: lengths, windows and edges of blocks and parts, shared heads, views of caches,
slots that are not seen, extreme scores, generation, mutations."""

import dataclasses

import pytest
import torch

import kernels.decode_attention as module
from bench.law import FACTOR, double, error, judge
from core.config import ModelConfig
from core.generate import generate
from core.layers import masked_attention
from core.models.gpt2 import GPT
from kernels import gemm
from kernels.decode_attention import decode_attention, decode_attention_cost, decode_attention_ref
from kernels.dispatch import Backends
from tests.harness import DEVICE, check_op, guarded, mutant, randn
from tests.mutations import Edit, mutations
from tests.test_model import awake

DTYPES = (torch.bfloat16, torch.float32)
NO_GRAD = ("q", "k", "v")
BELOW = 30 - 2**32  # 30 to who keeps 32 bits
triton_op = decode_attention.backends["triton"]


def inputs(shape, lengths, dtype=torch.float32, seed=0, **changes):
    """shape: S, H, G, D; a row for each length."""
    S, H, G, D = shape
    make, B = randn(seed, dtype), len(lengths)
    given = {"q": make(B, 1, H, D), "k": make(B, S, G, D), "v": make(B, S, G, D)}
    return given | {"lengths": torch.tensor(lengths, device=DEVICE)} | changes


def hold(args, op=decode_attention, **options):
    """In bf16 nothing but the last rounding may count."""
    once = ("y",) if args["q"].dtype == torch.bfloat16 else ()
    check_op(op, args, no_grad=NO_GRAD, rounded_once=once, **options)


def check(shape, lengths, dtype=torch.float32, op=decode_attention, changes=(), **options):
    hold(inputs(shape, lengths, dtype, **dict(changes)), op, **options)


@pytest.fixture
def few_programs(monkeypatch):
    """Long parts: of a GPU of one multiprocessor, where there is none."""
    monkeypatch.setattr(gemm, "PROGRAMS_WITHOUT_GPU", 1)


SHAPES = {  # S, H, G, D: lengths; blocks are of 64 slots, with 128 channels of 32 or 16, with 256 of 16 or 8
    (150, 2, 2, 16): (1, 63, 64, 65, 129, 150),
    (64, 1, 1, 8): (64, 1, 2),
    (3, 2, 2, 64): (1, 2, 3),
    (1, 2, 2, 40): (1, 1),
    (70, 1, 1, 128): (15, 16, 17, 32, 33, 70),
    (40, 1, 1, 256): (7, 8, 9, 40),
    (150, 4, 2, 16): (1, 63, 64, 65, 150),
    (70, 3, 1, 24): (1, 64, 70),
    (70, 16, 2, 8): (1, 64, 70),
    (70, 6, 2, 128): (15, 16, 17, 65, 70),
    (40, 2, 1, 256): (15, 16, 33, 40),
    (4, 8, 2, 64): (2, 3, 4),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, dtype):
    check(shape, SHAPES[shape], dtype)


@pytest.mark.parametrize("G", [2, 1])
@pytest.mark.parametrize("window", [0, 1, 63, 64, 149, 500])
def test_windows(window, G):
    """On either side of a block, of a length and of the cache."""
    check((150, 2, G, 16), (1, 64, 65, 66, 150), torch.bfloat16, changes={"window": window})


@pytest.mark.parametrize("window", [None, 130])
@pytest.mark.parametrize("shape", [(330, 2, 2, 16), (330, 4, 2, 16)], ids=str)
def test_long_parts(shape, window, few_programs):
    """Several steps to a program; five rows of two heads are one part each, one row is two."""
    for lengths in ((1, 65, 192, 193, 330), (330,), (170,)):
        check(shape, lengths, torch.bfloat16, changes={"window": window})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_lengths_of_either_type_and_any_stride(dtype):
    lengths = torch.tensor([9, -5, 70, -5, 1, -5], dtype=dtype, device=DEVICE)[::2]
    for G in (2, 1):
        hold(inputs((70, 2, G, 8), (0, 0, 0)) | {"lengths": lengths})
    hold(inputs((70, 2, 2, 8), (0, 0, 0)) | {"lengths": lengths[1:2].expand(3)})


@pytest.mark.parametrize("layout", ["rows apart", "every other"])
@pytest.mark.parametrize("G", [4, 2])
def test_layouts(G, layout):
    check((70, 4, G, 16), (1, 65, 70), torch.bfloat16, layout=layout)


@pytest.mark.parametrize("H", [2, 4])
def test_views_of_a_cache(H):
    """Some rows, some slots and some heads of larger tensors, read where they are."""
    wide, narrow = guarded(randn(1, torch.bfloat16)(7, 90, 5, 16)), guarded(randn(2, torch.bfloat16)(9, 80, 4, 24))
    queries = guarded(randn(3, torch.bfloat16)(3, 5, 9, 16))
    args = {"q": queries[:, 2:3, :H], "k": wide[1::2, 3:73, 1:3], "v": narrow[:6:2, 4:74, 2:, 8:]}
    args["lengths"] = torch.tensor([70, 5, 66], device=DEVICE)
    want = triton_op(**{name: t.contiguous() for name, t in args.items()})
    assert torch.equal(decode_attention.checked("triton")(**args), want)
    whole = double({name: t.contiguous() for name, t in args.items()})
    assert error(want, decode_attention_ref(**whole)) < 1e-2


@pytest.mark.parametrize("apart", ["rows", "slots", "heads"])
@pytest.mark.parametrize("H", [2, 4])
def test_more_than_two_billion_elements_apart(H, apart):
    """Memory that is only asked for."""
    args = inputs((3, H, 2, 8), (3, 2), torch.bfloat16)
    far = 2**31 + 16
    strides = {"rows": (far, 16, 8, 1), "slots": (64, far // 2, 8, 1), "heads": (64, 16, far, 1)}[apart]
    given = dict(args)
    for name in ("k", "v"):
        memory = torch.empty(far + 256, dtype=torch.bfloat16, device=DEVICE)
        given[name] = memory.as_strided((2, 3, 2, 8), strides).copy_(args[name])
    assert torch.equal(triton_op(**given), triton_op(**args))


def check_unseen(G, window, op=triton_op):
    """NaN and infinity where no row looks."""
    lengths = (1, 64, 65, 150)
    args = inputs((200, 2, G, 16), lengths, torch.bfloat16, window=window)
    dirty = dict(args)
    for name, bad in (("k", torch.nan), ("v", torch.inf)):
        dirty[name] = args[name].clone()
        for row, n in zip(dirty[name], lengths):
            row[n:] = bad
            if window is not None:
                row[: max(0, n - 1 - window)] = bad
    assert torch.equal(op(**dirty), op(**args))


@pytest.mark.parametrize("window", [None, 0, 70])
@pytest.mark.parametrize("G", [2, 1])
def test_slots_that_are_not_seen_may_hold_anything(G, window):
    check_unseen(G, window)


@pytest.mark.parametrize("G", [2, 1])
def test_what_is_seen_reaches_only_its_own_row_and_heads(G):
    """NaN in a score, and in a value."""
    for name in ("q", "k", "v"):
        args = inputs((150, 2, G, 16), (150, 70, 150))
        clean = triton_op(**args)
        args[name][1, :1, 0] = torch.nan
        y = triton_op(**args)
        bad = torch.zeros(3, 2, dtype=torch.bool, device=DEVICE)
        bad[1, : 1 if G == 2 or name == "q" else 2] = True
        assert torch.equal(y.isnan().all(-1)[:, 0], bad)
        assert torch.equal(y[:, 0][~bad], clean[:, 0][~bad])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("G", [2, 1])
def test_one_slot_that_takes_it_all(G, dtype):
    """p > 0.999, in each block in turn; and scores that would overflow the exponential function without a largest."""
    args = inputs((150, 2, G, 16), (150,) * 4, dtype)
    for row, slot in enumerate((0, 63, 64, 149)):
        args["k"][row, slot] = 40 * args["q"][row, 0, :G] / args["q"][row, 0, :G].norm(dim=-1, keepdim=True)
    q, k = args["q"][:, 0].double(), args["k"].repeat_interleave(2 // G, 2).double()
    scores = torch.einsum("bhd,bshd->bhs", q, k) / 4
    assert scores.softmax(-1)[:, 0].amax(-1).min() > 0.999
    for scale in (None, 50.0, 0.01):
        hold(args | {"scale": scale})
    hold(args | {"q": -args["q"], "scale": 10.0})


@pytest.mark.parametrize("backend", ["triton"] if DEVICE == "cuda" else ["triton", "ref"])
def test_lengths_that_break_the_promise(backend):
    """More than there is counts as all; less than one sees nothing, and is 0, with one part and with several."""
    call = decode_attention.checked(backend)
    for S in (40, 200):
        for G in (2, 1):
            args = inputs((S, 2, G, 16), (S, S, 5, 5, 5))
            lengths = torch.tensor([S + 7, 2**40, 0, -1, BELOW], device=DEVICE)
            for window in (None, 3):
                want, got = (call(**args | {"window": window, "lengths": n}) for n in (args["lengths"], lengths))
                assert torch.equal(got[:2], want[:2]) and not got[2:].any() and want[2:].all()


def test_a_ring_is_all_seen_in_any_order():
    """Slots of the last S positions, turned: the same softmax."""
    args = inputs((70, 2, 2, 16), (70, 70))
    turned = args | {name: args[name].roll(23, dims=1) for name in ("k", "v")}
    torch.testing.assert_close(triton_op(**turned), triton_op(**args))


@pytest.mark.parametrize("shape", [(150, 2, 2, 8), (150, 4, 2, 8), (20, 2, 2, 8)], ids=str)
def test_torch_compile_and_opcheck(shape):
    check(shape, (1, 20, 7), torch.bfloat16, changes={"window": 30}, compiled=True, opcheck=True)


def test_a_gradient_is_refused_and_not_lost():
    args = inputs((20, 2, 2, 8), (20,))
    args["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="autograd|grad"):
        triton_op(**args).sum().backward()


def test_launches_follow_from_sizes_alone(monkeypatch):
    """Never from lengths; a row that is one part is not merged."""
    launched = []
    monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **options: launched.append((kernel, grid)))
    for lengths in ((1, 1), (2000, 77)):
        triton_op(**inputs((2000, 2, 2, 8), lengths))
    assert launched[:2] == launched[2:] and launched[1][0] is module._decode_merge_kernel
    launched.clear()
    triton_op(**inputs((2000, 2, 2, 8), (2000, 2000), window=20))
    assert launched == [(module._decode_one_kernel, (4,))]


@pytest.mark.parametrize(
    "B, G, W, block_n", [(1, 12, 2048, 32), (64, 12, 2048, 32), (8, 12, 513, 32), (1, 1, 9999, 16)]
)
def test_parts_cover_the_slots_and_fill_the_gpu(B, G, W, block_n):
    chunk, splits = module._split(B, G, W, block_n, torch.device("cpu"))
    assert chunk % block_n == 0 and (splits - 1) * chunk < W <= splits * chunk and splits <= module.MAX_SPLITS
    assert B * G * splits >= 264 or chunk == block_n or splits > module.MAX_SPLITS // 2


def test_the_reference_is_attention_with_a_mask():
    """To the bit what generation did before there was this op."""
    for dtype in DTYPES:
        for H in (2, 6):
            args = inputs((20, H, 2, 16), (1, 7, 20), dtype)
            mask = torch.arange(20, device=DEVICE) < args["lengths"][:, None, None, None]
            q, k, v = (args[name] for name in NO_GRAD)
            assert torch.equal(decode_attention_ref(**args), masked_attention(q, k, v, mask))


# generation -------------------------------------------------------------------

CFG = ModelConfig(depth=2, d_model=64, d_head=16, n_kv_head=2, seq_len=16, vocab_size=265, window_pattern="SL")
STEPS = 12


@pytest.fixture
def small_parts(monkeypatch):
    """Short windows of 4 tokens, which a few tokens wrap, and parts of 16 slots: the rings of 17 have two."""
    monkeypatch.setattr("core.models.gpt2.WINDOW_MULTIPLE", 4)
    monkeypatch.setattr(module, "_config", lambda *_: {"BLOCK_N": 16, "num_warps": 4, "num_stages": 3})


def models(n_kv_head, dtype):
    """By name: with the kernel, with the reference, and in float64."""
    cfg = dataclasses.replace(CFG, n_kv_head=n_kv_head)
    found = {}
    for name, request in (("triton", "ref,decode_attention=triton"), ("ref", "ref"), ("exact", "ref")):
        backends = Backends(request, device=torch.device(DEVICE), dtype=dtype)
        with torch.device(DEVICE):
            model = GPT(cfg, backends)
        on_triton = {choice.op for choice in backends.choices if choice.backend == "triton"}
        assert on_triton == ({"decode_attention"} if name == "triton" else set())
        model.load_state_dict(awake(cfg).state_dict())
        for p in model.parameters():
            p.data = p.data.to(dtype if p.dim() > 1 else torch.float32)
        found[name] = model
    exact = found["exact"].double()
    exact.rope = lambda n: tuple(t.double() for t in GPT.rope(exact, n))
    assert set(found["ref"].dims.windows) == {4, 16}
    return found


PROMPTS = (1, 7, 20)  # tokens: less than the short windows, beyond them, beyond T


def texts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, CFG.vocab_size, (n + STEPS,), generator=generator).tolist() for n in PROMPTS]


@torch.no_grad()
def logits_after(model):
    """(STEPS, rows, V) of rows of several lengths that go on together."""
    cache = model.new_cache(len(PROMPTS), max(PROMPTS) + STEPS)
    given = [torch.tensor([text], device=DEVICE) for text in texts()]
    for i, n in enumerate(PROMPTS):
        model.hidden(given[i][:, :n], cache.row(i))
    steps = []
    for step in range(STEPS):
        ids = torch.cat([text[:, n + step : n + step + 1] for text, n in zip(given, PROMPTS)])
        steps.append(model.logits(model.hidden(ids, cache)[:, -1]))
    return torch.stack(steps)


@pytest.mark.parametrize("n_kv_head, dtype", [(2, torch.bfloat16), (None, torch.float32)])
def test_generation_keeps_the_law(n_kv_head, dtype, small_parts):
    """Rows of different lengths in one batch, beyond the windows and around the rings several times."""
    got = {name: logits_after(model) for name, model in models(n_kv_head, dtype).items()}
    exact = got.pop("exact")
    assert not torch.equal(got["triton"], got["ref"])  # it was another code
    for row in range(len(PROMPTS)):
        errors = {name: error(logits[:, row], exact[:, row]) for name, logits in got.items()}
        judge(f"row {row}", [errors["triton"]], [errors["ref"]], exact[:, row].numel(), FACTOR)


def test_the_same_text(small_parts):
    found = models(2, torch.float32)
    options = {"temperature": 0.0, "top_k": 0, "seed": 0}
    prompts = [text[:n] for text, n in zip(texts(), PROMPTS)]
    want, got = ([*generate(found[name], prompts, 8, **options)] for name in ("ref", "triton"))
    assert got == want


def test_what_a_cache_shows(small_parts):
    cache = models(2, torch.float32)["ref"].new_cache(3, 30)
    cache.positions += torch.tensor([0, 4, 25], device=DEVICE)
    assert [seen.tolist() for seen in cache.seen()] == [[1, 5, 5], [1, 5, 17]]


# what is refused --------------------------------------------------------------

GOOD = inputs((6, 4, 2, 8), (6, 2))


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(q=torch.ones(2, 2, 4, 8)), r"q is \(2, 2, 4, 8\) .*expected \(B, 1, H, D\)"),
        (dict(q=torch.ones(2, 4, 8)), "q is"),
        (dict(q=torch.ones(0, 1, 4, 8)), "none of them 0"),
        (dict(q=torch.ones(2, 1, 4, 8).half()), "float16"),
        (dict(k=torch.ones(2, 6, 3, 8)), r"k is \(2, 6, 3, 8\) .*G divides 4"),
        (dict(k=torch.ones(2, 0, 2, 8)), "k is"),
        (dict(k=torch.ones(2, 2, 8)), "k is"),
        (dict(k=torch.ones(3, 6, 2, 8)), r"k is \(3, 6, 2, 8\) .*expected \(2, 6, 2, 8\)"),
        (dict(v=torch.ones(2, 6, 2, 16)), r"v is \(2, 6, 2, 16\)"),
        (dict(v=torch.ones(2, 6, 2, 8).bfloat16()), "v is .*bfloat16"),
        (dict(k=torch.ones(2, 6, 8, 2).mT), "k is .*adjacent channels"),
        (dict(lengths=torch.ones(3, dtype=torch.int64)), r"lengths is \(3,\)"),
        (dict(lengths=torch.ones(2)), "lengths is .*float32 .*; expected .* int64 or int32"),
        (dict(lengths=torch.ones(2, dtype=torch.int64, device="meta")), "lengths is .*meta"),
        (dict(window=-1), "window is -1"),
        (dict(scale=0.0), "scale is 0.0"),
        (dict(scale=float("nan")), "scale is nan"),
    ],
)
@pytest.mark.parametrize("backend", decode_attention.backends)
def test_bad_calls_are_refused(backend, change, says):
    change = {name: t.to(DEVICE) if getattr(t, "is_cpu", False) else t for name, t in change.items()}
    with pytest.raises(ValueError, match=says):
        decode_attention.checked(backend)(**{**GOOD, **change})


@pytest.mark.parametrize(
    "shape, dtype, says",
    [
        ((6, 4, 2, 12), torch.float32, "a multiple of 8 channels from 8 to 256, not 12"),
        ((6, 4, 2, 264), torch.float32, "not 264"),
        ((6, 17, 1, 8), torch.float32, "up to 16 query heads to a head of k, not 17"),
        ((6, 4, 2, 8), torch.float64, "float64"),
    ],
)
def test_the_kernel_refuses_what_it_cannot_take(shape, dtype, says):
    args = inputs(shape, (6, 2), dtype)
    decode_attention.checked("ref")(**args)
    with pytest.raises(ValueError, match=says):
        decode_attention.checked("triton")(**args)


def test_cost():
    shape = (3, 100, 4, 2, 8, 100)
    caches, queries = 2 * 3 * 100 * 2 * 8, 2 * 3 * 4 * 8
    assert decode_attention_cost(shape, torch.bfloat16) == (2 * 2 * 3 * 100 * 4 * 8, 2 * (caches + queries) + 8 * 3)
    half = decode_attention_cost((3, 100, 4, 2, 8, 50), torch.bfloat16)
    assert half == decode_attention_cost((3, 50, 4, 2, 8, 50), torch.bfloat16)


# mutations --------------------------------------------------------------------

ONE, GROUP, MERGE = "_decode_one_kernel", "_decode_group_kernel", "_decode_merge_kernel"
MUTATIONS = {
    "the own slot is not seen": [Edit(r"length - W, 0\), length", "length - W, 0), length - 1")],
    "the window is one slot wider": [Edit(r"tl.maximum\(length - W, 0\)", "tl.maximum(length - W - 1, 0)")],
    "the window is one slot narrower": [Edit(r"tl.maximum\(length - W, 0\)", "tl.maximum(length - W + 1, 0)")],
    "the window does not end at the beginning": [Edit(r"tl.maximum\(length - W, 0\)", "length - W")],
    "rows have the length of the first": [Edit(r"lengths_ptr \+ b \* stride_lengths", "lengths_ptr")],
    "lengths lie side by side": [Edit(r"lengths_ptr \+ b \* stride_lengths", "lengths_ptr + b")],
    "lengths beyond S are believed": [Edit(r"tl.minimum\(tl.maximum\(length, 0\), S\)", "tl.maximum(length, 0)")],
    "lengths below 1 are believed": [Edit(r"tl.maximum\(length, 0\)", "length")],
    "one: the last block is not masked": [Edit(r"seen = slots < end", "seen = slots < S", ONE)],
    "group: the last block is not masked": [Edit(r"seen = slots < end", "seen = slots < S", GROUP)],
    "one: unseen scores are 0": [Edit(r'-float\("inf"\)', "0.0", ONE)],
    "group: unseen scores are 0": [Edit(r'-float\("inf"\)', "0.0", GROUP)],
    "one: parts overlap": [Edit(r"tl.minimum\(begin \+ chunk, end\)", "tl.minimum(begin + chunk + 1, end)", ONE)],
    "group: parts overlap": [Edit(r"tl.minimum\(begin \+ chunk, end\)", "tl.minimum(begin + chunk + 1, end)", GROUP)],
    "one: old sums are not scaled down": [Edit(r"acc \* alpha\[:, None\] \+ p", "acc + p", ONE)],
    "group: old sums are not scaled down": [Edit(r"acc = acc \* alpha\[:, None\]", "pass", GROUP)],
    "one: the sum is not scaled down": [Edit(r"l \* alpha \+ p", "l + p", ONE)],
    "group: the sum is not scaled down": [Edit(r"l \* alpha \+ tl.sum", "l + tl.sum", GROUP)],
    "one: places count alike": [Edit(r"alpha = _weight\(m, largest\)\n", "alpha = 1.0 + 0.0 * m\n", ONE)],
    "one: there is no largest": [Edit(r"largest = tl.maximum\(m, s\)", "largest = m * 0.0", ONE)],
    "group: there is no largest": [Edit(r"tl.maximum\(m, tl.max\(s, axis=1\)\)", "m * 0.0", GROUP)],
    "one: the scale is forgotten": [Edit(r"scale \* tl.sum", "tl.sum", ONE)],
    "group: the scale is forgotten": [Edit(r"scale \* tl.dot", "tl.dot", GROUP)],
    "group: probabilities are rounded": [Edit(r"if v.dtype != tl.float32:", "if False:", GROUP)],
    "group: heads take the queries of the first": [Edit(r"\(g \* R \+ offs_r\)", "(0 * g + offs_r)", GROUP)],
    "group: heads beyond the group are written": [Edit(r"offs_r < R", "offs_r < R + 1", GROUP)],
    "one: channels beyond the head are written": [Edit(r"mask_d = offs_d < D", "mask_d = offs_d < BLOCK_D", ONE)],
    "one: v has the strides of k": [Edit(r"wide \* stride_v_s", "wide * stride_k_s", ONE)],
    "group: v has the strides of k": [Edit(r"b \* stride_v_b", "b * stride_k_b", GROUP)],
    "one: slots have 32 bits": [Edit(r"slots.to\(tl.int64\)", "slots", ONE)],
    "group: slots have 32 bits": [Edit(r"slots.to\(tl.int64\)", "slots", GROUP)],
    "the base of the exponential is 2": [Edit(r"\(m - largest\) \* LOG2E", "(m - largest)")],
    "merge: parts without slots are read": [Edit(r" & \(first \+ offs_s \* chunk < end\)", "", MERGE)],
    "merge: a part too few": [Edit(r"offs_s \* chunk < end", "(offs_s + 1) * chunk < end", MERGE)],
    "merge: parts count alike": [Edit(r"alpha = _weight\(m, tl.max\(m, axis=0\)\)", "alpha = 1.0 + 0.0 * m", MERGE)],
    "merge: parts of another head": [Edit(r"\+ offs_s\) \* H \+ h", "+ offs_s) * H + (h + 1) % H", MERGE)],
    "parts keep the rounded result": [
        Edit(r"acc = q.new_empty\(\(B, splits, H, D\), dtype=torch.float32\)", "acc = q.new_empty(B, splits, H, D)")
    ],
    "parts follow lengths": [
        Edit(r"chunk, splits = _split\(B, G, W,", "chunk, splits = _split(B, G, min(W, int(lengths[0])),")
    ],
}  # fmt: skip
CLASSES = [
    "the window is one slot wider",
    "rows have the length of the first",
    "lengths below 1 are believed",
    "group: the last block is not masked",
    "group: probabilities are rounded",
    "one: slots have 32 bits",
    "merge: parts without slots are read",
    "merge: parts count alike",
]


def all_checks(op):
    """The checks of this file in short, on a copy of the op's file."""
    triton = op.backends["triton"]
    for G in (4, 2):
        check_unseen(G // 2, 70, triton)
        for layout in ("contiguous", "rows apart"):
            check((150, 4, G, 24), (1, 64, 70, 150), torch.bfloat16, op=op, changes={"window": 99}, layout=layout)
        large = inputs((150, 4, G, 16), (150, 65))
        hold(large | {"q": 30 * large["q"], "scale": 3.0}, op)
        far, memory = inputs((3, 4, G, 8), (3,), torch.bfloat16), torch.empty(2**31 + 256, dtype=torch.bfloat16)
        k = memory.as_strided((1, 3, G, 8), (8 * G, 2**30 + 8, 8, 1)).copy_(far["k"])
        assert torch.equal(triton(**far | {"k": k}), triton(**far))
        lengths = torch.tensor([157, 0, 2**40, 0, 0, 0, BELOW, 0])[::2]
        hold(inputs((150, 4, G, 16), (0, 0, 0, 0)) | {"lengths": lengths}, op)
        # so few slots, of nearly the same weight, that roundings of probabilities do not average out
        check((4, 4, G, 128), (2, 3, 3, 4) * 2, torch.bfloat16, op=op, changes={"scale": 0.03})


@pytest.mark.skipif(DEVICE == "cuda", reason="a broken kernel may end the CUDA context of the other tests")
@pytest.mark.parametrize("name", mutations(MUTATIONS, always=CLASSES))
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    broken = mutant(module, MUTATIONS[name], tmp_path).decode_attention
    with pytest.raises(AssertionError):
        all_checks(broken)
        monkeypatch.setattr(gemm, "PROGRAMS_WITHOUT_GPU", 1)
        all_checks(broken)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_a_copy_that_is_not_broken_passes(tmp_path):
    same = mutant(module, {"HEAD_MULTIPLE = 8, 256, 8": "HEAD_MULTIPLE = 8, 248, 8"}, tmp_path)
    all_checks(same.decode_attention)
