"""Several processes train as one: what each owns, what passes between them and when, on gloo."""

import dataclasses
import functools
import itertools
import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import train
from core import communication
from core.communication import joined_world
from core.config import ModelConfig, OptimConfig, preset
from core.exchange import Exchange
from core.fp8 import Recipe
from core.models.gpt2 import GPT, parameter_table
from core.optim import Gradients, Optimizer, learning_rates
from core.params import arenas
from core.plan import predict_memory
from core.sharding import Grid, Shard, deal
from core.timing import StepTimes
from kernels.dispatch import Backends
from kernels.polar_express import polar_express_cost
from tests import test_processes

# two stages of layers, the second of one; k and v as wide as q, or half; no scale to mark a stage by
CFG = ModelConfig(depth=5, d_model=64, d_head=32, seq_len=16, vocab_size=100)
MODELS = {
    "default": CFG,
    "tied": dataclasses.replace(CFG, untied_head=False, value_embeds=False),
    "grouped": dataclasses.replace(CFG, n_kv_head=1, resid_lambdas=False),
    "gelu": dataclasses.replace(CFG, depth=4, relu2=False, x0_lambdas=False),
    # no small parameter whose sum the outcome could travel with
    "bare": dataclasses.replace(
        CFG, depth=4, value_embeds=False, resid_lambdas=False, x0_lambdas=False, smear=False, backout=False
    ),
}

RUNS_ON = SimpleNamespace(wanted=False)  # for the flag of signals


# dealing


@pytest.mark.parametrize("depth", range(8, 33, 4))
def test_dealing_is_level(depth):
    """At the track's sizes, on up to 64 ranks: nobody owns nothing, or more than 5 % above the mean; work on matrices
    is level up to the largest of them, which is one rank's."""
    table = parameter_table(dataclasses.replace(preset("gpt2", "cuda").model, depth=depth))
    whole = sum(p.numel for p in table if p.computes and not p.name.startswith("ve_gate"))
    largest = max(
        polar_express_cost((1, *arena.shape[1:]), torch.bfloat16)[0] for arena in arenas(table) if arena.views
    )
    for places in range(2, 65):
        dealing = deal(table, places)
        assert sum(dealing.elements) == whole and min(dealing.elements) > 0
        assert max(dealing.elements) < 1.05 * whole / places, places
        assert max(dealing.flops) <= sum(dealing.flops) / places + largest, places
    # of one node: equal work, and of four layers at a time equal parts
    eight = deal(table, 8)
    assert len(set(eight.flops)) == 1
    for number in range(depth // 4):
        received = [0] * 8
        for arena in arenas(table):
            for p in arena.params:
                if p.name in eight.bounds and p.name.endswith(f".{number}"):
                    for place, (begin, end) in enumerate(itertools.pairwise(eight.bounds[p.name])):
                        received[place] += (end - begin) * p.numel // arena.units(p)
        assert len(set(received)) == 1


@pytest.mark.parametrize("places", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("name", MODELS)
def test_every_unit_has_one_owner(name, places):
    table = parameter_table(MODELS[name])
    dealing = deal(table, places)
    for arena in arenas(table):
        owned = [dealing.own(arena, place) for place in range(places)]
        if arena.params[0].name not in dealing.bounds:  # gates and scalars
            assert all(part is arena for part in owned) and sum(p.numel for p in arena.params) < 512
            continue
        assert sum(part.shape[0] for part in owned) == arena.shape[0]
        for i, p in enumerate(arena.params):
            ends = [part.held[i] for part in owned]
            assert ends[0][0] == 0 and ends[-1][1] == arena.units(p)
            assert all(a[1] == b[0] for a, b in zip(ends, ends[1:]))


def test_places_are_by_local_rank():
    assert [Grid(2, 3).place(rank) for rank in range(6)] == [0, 2, 4, 1, 3, 5]
    assert [Grid(1, 4).place(rank) for rank in range(4)] == [0, 1, 2, 3]


# processes


def together(n, work, *args, local_size=None):
    """What work(*args) gives on each of n ranks."""
    results = test_processes.together(work, *args, ranks=n, local_size=local_size)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def trainer_of(world, cfg, micro_steps, batches, dtype=torch.float32, compiler=None, recipe=None, **options):
    """As train.build makes one, with batches (steps, micro-steps, rows, T + 1) of its own."""
    backends = Backends("ref", device=world.device, dtype=dtype)
    model = GPT(cfg, backends, batches.size(2), recipe=recipe, **options)
    model.init_weights(0)
    with torch.no_grad():  # at first, what adds to the stream is zero
        for bank in (*model.attn_out, *model.mlp_down):
            bank.copy_(0.1 * torch.randn(bank.shape, generator=torch.Generator().manual_seed(1)))
    lrs = learning_rates(OptimConfig(scaling_laws=False, embedding_lr=0.1, matrix_lr=0.01), cfg.d_model, 1)
    peers = communication.peers(world)
    dealing, place = deal(model.table, world.world_size), peers.grid.place(world.rank)
    own = None if world.world_size == 1 else lambda arena: dealing.own(arena, place)
    optimizer = Optimizer(
        model, lrs=lrs, weight_decay=0.1, ns_steps=5, compute_dtype=dtype, backends=backends, own=own
    )  # fmt: skip
    gradients = Gradients(model, optimizer)
    parts = {"world": world, "peers": peers, "dealing": dealing}
    given = ((batch[..., :-1].contiguous(), batch[..., 1:].contiguous()) for batch in batches)
    return train.Trainer(
        cfg=SimpleNamespace(optim=OptimConfig(warmup_steps=4)),
        plan=SimpleNamespace(grad_accum_steps=micro_steps, steps=20),
        world=world,
        model=model,
        forward=torch.compile(model, backend=compiler, fullgraph=True, dynamic=False) if compiler else model,
        optimizer=optimizer,
        gradients=gradients,
        exchange=None if world.world_size == 1 else Exchange(model, optimizer, gradients, **parts),
        loader=SimpleNamespace(
            next_step=lambda: next(given),
            fault_ahead=lambda steps: None,
        ),
        times=StepTimes(world.device),
    )


def batches_of(cfg, steps, micro_batches, rows=2, seed=0):
    """Of a task that can be learned: each token follows from the one before it."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(90, (steps, micro_batches, rows, 1), generator=generator)
    return (first + 7 * torch.arange(cfg.seq_len + 1)) % 90


def losses_and_weights(steps, cfg, batches, same=False, dtype=torch.float32, compiler=None, recipe=None, **options):
    """Of steps over micro-batches (steps, n, rows, T + 1), dealt out to the ranks; same: each rank has all of them."""
    with joined_world("cpu") as world:
        n = batches.size(1) // (1 if same else world.world_size)
        mine = batches if same else batches[:, world.rank * n : (world.rank + 1) * n]
        trainer = trainer_of(world, cfg, n, mine, dtype, compiler, recipe, **options)
        losses = [train.train_step(trainer, i, RUNS_ON)[0].item() for i in range(steps)]
        trainer.weights_arrive()
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        copies = {n: t.float() for n, t in trainer.model.named_buffers() if "_q" in n}
        return losses, weights, trainer.optimizer.state, copies


def assert_close(got, want, tolerance):
    assert got[0] == pytest.approx(want[0], rel=tolerance)
    assert want[0][-1] < 0.9 * want[0][0]  # it learns
    for name, p in want[1].items():
        assert (got[1][name] - p).norm() <= 10 * tolerance * p.norm(), name


def assert_same(got, want):
    assert got[0] == want[0]
    assert all(torch.equal(got[1][name], p) for name, p in want[1].items())


def joined_state(ranks, name):
    """A state of all ranks: every element has one owner."""
    shards = [state[name] for _, _, state, _ in ranks]
    whole = torch.full(shards[0].shape, torch.nan).to(shards[0].dtype)
    count = torch.zeros(shards[0].shape)
    for shard in shards:
        assert shard.shape == shards[0].shape and shard.dtype == shards[0].dtype
        for begin, piece in shard.pieces:
            place = tuple(slice(b, b + n) for b, n in zip(begin, piece.shape, strict=True))
            whole[place] = piece
            count[place] += 1
    assert (count == 1).all(), name
    return whole


@functools.cache
def alone(name, micro_batches, steps=20, **options):
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    cfg = MODELS[name]
    return losses_and_weights(steps, cfg, batches_of(cfg, steps, micro_batches), **options)


@pytest.mark.parametrize("n, local_size", [(2, 2), (4, 4), (4, 2), (3, 3)])
def test_twenty_steps_are_those_of_one_process(n, local_size):
    """Of one node and of two. States live with their owner, and are those of one process."""
    micro_batches = 12 if n == 3 else 4
    cfg = MODELS["default"]
    want = alone("default", micro_batches)
    batches = batches_of(cfg, 20, micro_batches)
    ranks = together(n, losses_and_weights, 20, cfg, batches, local_size=local_size)
    for got in ranks:
        assert_close(got, want, 1e-4)
        assert_same(got, ranks[0])
    shared = [name for name, state in ranks[0][2].items() if isinstance(state, Shard)]
    assert {"attn_qkv.0.momentum", "mlp_down.1.second.0", "wte.exp_avg", "lm_head.exp_avg_sq"} <= set(shared)
    held = [
        sum(piece.numel() for s in state.values() if isinstance(s, Shard) for _, piece in s.pieces)
        for _, _, state, _ in ranks
    ]
    total = sum(torch.Size(ranks[0][2][name].shape).numel() for name in shared)
    assert sum(held) == total and max(held) < 1.2 * total / n
    for name, state in want[2].items():
        got = joined_state(ranks, name) if name in shared else ranks[0][2][name]
        assert (got - state).norm() <= 5e-3 * state.norm(), name


def test_low_halves_are_with_the_owners_of_their_matrices():
    """Before the first step: each has that of its own."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    batches = batches_of(CFG, 1, 2)
    want = losses_and_weights(0, CFG, batches, dtype=torch.bfloat16)[2]
    ranks = together(2, losses_and_weights, 0, CFG, batches, False, torch.bfloat16)
    lows = [name for name, state in ranks[0][2].items() if name.endswith(".low") and isinstance(state, Shard)]
    assert len(lows) == 9  # of eight banks and the head
    for name in lows:
        assert torch.equal(joined_state(ranks, name), want[name]), name


@pytest.mark.parametrize("name", [name for name in MODELS if name != "default"])
def test_other_models_are_those_of_one_process(name):
    want = alone(name, 2, 8)
    ranks = together(2, losses_and_weights, 8, MODELS[name], batches_of(MODELS[name], 8, 2))
    for got in ranks:
        assert got[0] == pytest.approx(want[0], rel=1e-4)
        assert_same(got, ranks[0])


def test_equal_micro_batches_give_the_bits_of_one_process():
    """The mean of two equal gradients is either: nothing else differs in how two processes train."""
    want = alone("default", 1)
    for got in together(2, losses_and_weights, 20, CFG, batches_of(CFG, 20, 1), True):
        assert_same(got, want)


def test_compiled_steps_are_the_same(tmp_path):
    """As one graph, whose backward gives gradients out before it ends."""
    batches = batches_of(CFG, 2, 4)
    eager = together(2, losses_and_weights, 2, CFG, batches)
    for got in together(2, losses_and_weights, 2, CFG, batches, False, torch.float32, "aot_eager"):
        assert_same(got, eager[0])


@contextmanager
def noted(trainer):
    """What happens in a step, in order: messages by their number of elements, and the end of backward."""
    events, honest = [], (dist.all_to_all_single, trainer.model.embed, trainer.model.attention)

    def message(output, *args, **options):
        events.append(("message", output.numel()))
        return honest[0](output, *args, **options)

    def embed(*args, **options):
        (x,) = honest[1](*args, **options)
        x.register_hook(lambda _: events.append(("backward", "embedding")))
        return (x,)

    def attention(i):
        def call(q, *args, **options):
            events.append(("forward", i))
            q.register_hook(lambda _: events.append(("backward", i)))
            return honest[2][i](q, *args, **options)

        return call

    waits = trainer.exchange.arrive
    trainer.model.embed, trainer.model.attention = embed, [attention(i) for i in range(trainer.model.dims.n_layer)]
    trainer.exchange.arrive = lambda stage=None: (events.append(("arrive", stage)), waits(stage))[1]
    dist.all_to_all_single = message
    yield events
    dist.all_to_all_single = honest[0]


def order_of_a_step():
    with joined_world("cpu") as world:
        trainer = trainer_of(world, CFG, 2, batches_of(CFG, 2, 2))
        with noted(trainer) as events:
            for i in range(2):
                events.append(("step", i))
                train.train_step(trainer, i, RUNS_ON)
        return events


def test_gradients_leave_before_backward_ends_and_weights_are_awaited_where_they_are_used():
    for events in together(2, order_of_a_step):
        begin = events.index(("step", 1))
        first, second = events[:begin], events[begin + 1 :]
        # gradients: none in the first micro-step, whose backward ends at the first of these
        ends = [i for i, event in enumerate(first) if event == ("backward", "embedding")]
        messages = [i for i, (kind, _) in enumerate(first) if kind == "message"]
        assert len(ends) == 2 and messages[0] > ends[0]
        # the last layer's bank leaves while four layers are to come, with the head; theirs before the embedding's
        early = [i for i in messages if i < first.index(("backward", 3), ends[0])]
        middle = [i for i in messages if first.index(("backward", 0), ends[0]) < i < ends[1]]
        assert len(early) == 5 and len(middle) == 4
        # then the tables, and all weights the same way: wte, values, eight banks, the head
        assert len(messages) == 11 + 11
        # weights: tables before forward begins, each stage before its first layer, and no sooner
        order = [event for event in second[: second.index(("backward", 4))] if event[0] in ("arrive", "forward")]
        layers = [("forward", i) for i in range(5)]
        assert order == [("arrive", 0), ("arrive", 1), *layers[:4], ("arrive", 2), layers[4]]


def exact_mean(half):
    """Of gradients that bf16 holds, but not their sum."""
    with joined_world("cpu") as world:
        trainer = trainer_of(world, CFG, 1, batches_of(CFG, 1, 1), torch.bfloat16)
        e = Exchange(
            trainer.model, trainer.optimizer, trainer.gradients, world=world,
            peers=communication.peers(world), dealing=deal(trainer.model.table, world.world_size), half=half,
        )  # fmt: skip
        seen, honest = set(), dist.all_to_all_single
        dist.all_to_all_single = lambda out, *a, **o: (seen.add(out.dtype), honest(out, *a, **o))[1]
        for total in trainer.gradients.sums:
            total.fill_(256.0 if world.rank == 0 else 1.0)
        outcome = torch.tensor([float(world.rank), 0.0])
        e.last_micro_step()
        e.backward_is_done(outcome)
        for i in range(len(e.owned)):
            e.receive(i)
        dist.all_to_all_single = honest
        return seen, [t.unique().tolist() for t in e.owned if t.numel()], outcome.tolist()


@pytest.mark.parametrize("local_size", [4, 2])
def test_half_the_bytes_travel_and_sums_are_fp32(local_size):
    for half, wire in ((True, {torch.bfloat16}), (False, {torch.float32})):
        for seen, means, outcome in together(4, exact_mean, half, local_size=local_size):
            assert seen == wire and outcome == [1.5, 0.0]
            # bf16 would lose two ones of the sum; between nodes it is rounded once more
            rounded = (256.0 + 2.0) / 4 if half and local_size == 2 else 259 / 4
            assert set(map(tuple, means)) == {(259 / 4,), (rounded,)}  # small ones travel as they are


def copies_in_fp8():
    """Those that training used last, and those of the weights, of all ranks."""
    cfg = dataclasses.replace(CFG, d_model=128, vocab_size=200)
    with joined_world("cpu") as world:
        options = {"dtype": torch.bfloat16, "recipe": Recipe(), "fp8_head": True}
        trainer = trainer_of(world, cfg, 1, batches_of(cfg, 3, 2)[:, world.rank : world.rank + 1], **options)
        trainer.model.refresh_copies()
        losses = [train.train_step(trainer, i, RUNS_ON)[0].item() for i in range(3)]
        trainer.weights_arrive()
        kept = {n: t.clone() for n, t in trainer.model.named_buffers() if n.endswith(("_q", "_q_t", "head_scale"))}
        trainer.model.refresh_copies()
        same = [torch.equal(t.float(), trainer.model.get_buffer(n).float()) for n, t in kept.items()]
        return losses, len(same), all(same)


def test_copies_in_fp8_follow_what_other_ranks_send():
    ranks = together(2, copies_in_fp8)
    assert ranks[0] == ranks[1] and ranks[0][1] > 10 and ranks[0][2]


def test_recomputed_layers_wait_and_give_as_others():
    batches = batches_of(CFG, 3, 2)
    plain = together(2, losses_and_weights, 3, CFG, batches)
    for got in together(2, functools.partial(losses_and_weights, recompute=True), 3, CFG, batches):
        assert_same(got, plain[0])


def loaded():
    """A step after the weights were written by somebody else."""
    with joined_world("cpu") as world:
        trainer = trainer_of(world, CFG, 1, batches_of(CFG, 2, 1))
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.mul_(0.5)
        trainer.model.refresh_copies()
        train.train_step(trainer, 0, RUNS_ON)
        trainer.weights_arrive()
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_owners_go_on_from_weights_that_were_loaded():
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    want = loaded()
    for got in together(2, loaded):
        assert all(torch.equal(got[name], p) for name, p in want.items())


def test_memory_of_a_process_falls_with_their_number():
    """States, by their number; gradients and weights are everywhere."""
    cfg = preset("gpt2", "cuda").model
    one, eight, many = (predict_memory(cfg, 8, torch.bfloat16, "cuda", world_size=n) for n in (1, 8, 64))
    assert eight["weights"] == one["weights"] and eight["gradients"] == one["gradients"]
    assert eight["optimizer"] == pytest.approx(one["optimizer"] / 8, rel=0.01)
    assert many["owned"] == pytest.approx(eight["owned"] / 8, rel=0.01) and "owned" not in one
    assert many["total"] < eight["total"] < one["total"]
