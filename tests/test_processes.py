"""Several processes on one machine, over gloo: what they add up, wait for, and how they end together.

They are forked from a server that has imported torch once; a program under torchrun imports it twice more.
"""

import json
import multiprocessing
import os
import socket
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

import train
from core import checkpoint, communication
from core.communication import gather_objects, joined_world, main_first
from core.data.packing import BestFitPacker
from core.stopping import TrainingError, UserError
from tests.test_train import events, final_tensors, losses, run

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.test_processes"])


def together(work, *args, ranks=2, local_size=None):
    """What work(*args) gives on each rank, or the exception that it raises there. local_size: ranks of a node, if there
    are several nodes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with ProcessPoolExecutor(ranks, CONTEXT) as pool:
        done = [pool.submit(_as_rank, rank, ranks, local_size or ranks, port, work, args) for rank in range(ranks)]
        return [rank.exception(timeout=120) or rank.result() for rank in done]


def _as_rank(rank, ranks, local_size, port, work, args):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank % local_size), "LOCAL_WORLD_SIZE": str(local_size)}
    torch.set_num_threads(1)
    return work(*args)


def first(fails):
    """main_first with work that only rank 0 has to survive."""
    with joined_world("cpu") as world:
        done = []

        def work():
            done.append(world.rank)
            if world.rank == 0 and fails is not None:
                raise fails
            return gather_objects

        try:
            main_first(work, "nothing")
        except SystemExit as end:
            return done, end.code
        except (UserError, OSError) as error:
            return done, str(error)
        return done, gather_objects(world.rank)


@pytest.mark.parametrize("fails, code", [(UserError("no text"), 2), (OSError(2, "no file"), 2)])
def test_where_rank_0_meets_bad_input_the_others_do_not_begin(fails, code):
    assert together(first, fails) == [([0], str(fails)), ([], code)]


def test_rank_0_comes_first_and_the_others_follow():
    assert together(first, None) == [([0], [0, 1]), ([1], [0, 1])]


def trained(argv):
    sys.stdout = open(os.devnull, "w")
    train.main(argv)


def test_two_processes_train_like_one_in_bf16(tiny, tmp_path):
    """Step by step, to the same score; what their loaders counted adds up."""
    options = [*tiny, "--precision", "bf16", "--steps", "6", "--save-every", "3"]
    one, two = run(options, tmp_path / "one"), tmp_path / "two"
    assert together(trained, [*options, "--out", str(two)]) == [None, None]
    assert losses(two) == pytest.approx(losses(one), rel=2e-3)
    a, b = final_tensors(one), final_tensors(two)
    for name in ("model.attn_qkv.0", "model.wte", "model.lm_head"):  # a step of rank 0's rows alone is another one
        assert (a[name].float() - b[name].float()).norm() < 0.1 * a[name].float().norm(), name
    summaries = [json.loads((out / "summary.json").read_text()) for out in (one, two)]
    assert summaries[0]["val_bpb"] == pytest.approx(summaries[1]["val_bpb"], rel=2e-3)
    for stats in (summaries[1]["data_stats"], events(two, "eval")[-1]["data"]):
        assert stats["tokens"] == 512 * (6 if stats is summaries[1]["data_stats"] else 5)
    assert summaries[1]["data_stats"] == pytest.approx(summaries[0]["data_stats"])


def test_two_processes_train_like_one_in_fp8(tiny, tmp_path):
    """With scales from the largest sizes on both: a site of one process alone would have others."""
    options = [*tiny, "--d-model", "128", "--d-head", "32", "--precision", "fp8", "--steps", "4"]
    one, two = run(options, tmp_path / "one"), tmp_path / "two"
    assert together(trained, [*options, "--out", str(two)]) == [None, None]
    assert losses(two) == pytest.approx(losses(one), rel=5e-3)
    a, b = final_tensors(one), final_tensors(two)
    # the first step's sizes are of the same weights; gradients are those of a mean over half of the tokens
    for name, times in (("fp8.activations.history", 1), ("fp8.gradients.history", 2)):
        assert a[name][-1].all()
        torch.testing.assert_close(b[name][-4], times * a[name][-4], rtol=0.02, atol=0)


def bad_line(argv, row):
    """Rank 1 cannot read row `row` of its stream."""
    filled, honest = [], BestFitPacker.fill

    def fill(self, *options):
        filled.append(self)
        if len(filled) > row and os.environ["RANK"] == "1":
            raise UserError("rows.jsonl, line 41: no text")
        honest(self, *options)

    BestFitPacker.fill = fill
    try:
        trained(argv)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("row, step", [(2, 0), (8 * 3 + 5, 3), (8 * 4, 4), (8 * 5, None)])
def test_a_line_that_one_process_cannot_read_stops_all_after_a_checkpoint(tiny, tmp_path, row, step):
    out = tmp_path / "run"
    options = ["--steps", "5", "--save-every", "2", "--eval-every", "None", "--sample-every", "None"]
    error, end = together(bad_line, [*tiny, *options, "--out", str(out)], row)
    newest = checkpoint.step_of(checkpoint.find(out))
    if step is None:  # it lies beyond the run
        assert (error, end, newest) == (None, None, 5) and (out / "report.md").exists()
        return
    assert "line 41: no text; " in error and f"step_{step:06d} is saved" in error and "--mended-data" in error
    assert isinstance(end, SystemExit) and end.code == 2
    assert newest == step and sorted(losses(out)) == list(range(step))


# waiting


def slow_main(step_seconds, patience, alone):
    """Rank 0 takes `alone` seconds before the others follow; then both reduce a tensor."""
    communication.STEP_SECONDS, communication.PATIENCE_SECONDS = step_seconds, patience
    with joined_world("cpu") as world:
        try:
            main_first(lambda: time.sleep(alone if world.is_main else 0), "a tokenizer")
        except TrainingError as error:
            return str(error)
        return communication.all_sum(torch.ones(1)).item()


def test_what_rank_0_does_alone_may_take_longer_than_a_step():
    assert together(slow_main, 1, 60, 2.5) == [2.0, 2.0]


def test_no_wait_is_without_end_and_its_error_says_for_what():
    main, other = together(slow_main, 60, 1, 2.5)
    assert other.startswith("waiting for a tokenizer, which did not come in 1 s (")
    assert "another process has ended" in main


def slow_save(argv):
    honest = checkpoint.save

    def save(*args, **options):
        time.sleep(1.6)
        honest(*args, **options)

    checkpoint.save, communication.STEP_SECONDS = save, 1
    trained(argv)


def test_ranks_wait_for_a_save_outside_of_the_next_step(tiny, tmp_path):
    options = ["--steps", "3", "--save-every", "2", "--out", str(tmp_path / "run")]
    assert together(slow_save, [*tiny, *options]) == [None, None]


def full_disk(argv):
    def save(*args, **options):
        raise OSError(28, "No space left on device", "checkpoints")

    checkpoint.save = save
    try:
        trained(argv)
    except TrainingError as error:
        return str(error)


def test_a_full_disk_ends_the_others_quietly(tiny, tmp_path):
    error, end = together(full_disk, [*tiny, "--steps", "3", "--save-every", "2", "--out", str(tmp_path / "run")])
    assert "the checkpoint of step 2 cannot be saved (checkpoints: No space left" in error
    assert isinstance(end, SystemExit) and end.code == 1


def fails_on_rank_1():
    def work():
        if os.environ["RANK"] == "1":
            raise UserError("rank 1 cannot")
        return "done"

    with joined_world("cpu"):
        return communication.together(work, "a test")


def test_what_fails_on_one_process_fails_on_all():
    first, second = together(fails_on_rank_1)
    assert isinstance(first, TrainingError) and "another process failed in a test" in str(first)
    assert isinstance(second, UserError) and str(second) == "rank 1 cannot"


def test_a_profile_of_two_nodes_ends_with_nothing_under_way(tiny, tmp_path):
    """PyTorch's profiler crashed there."""
    out = tmp_path / "run"
    argv = [*tiny, "--profile", "1", "--steps", "14", "--eval-every", "None", "--sample-every", "None"]
    assert together(trained, [*argv, "--out", str(out)], ranks=4, local_size=2) == [None] * 4
    assert len(losses(out)) == 14 and json.loads((out / "summary.json").read_text())["time_by_op"]
