"""What befalls one rank of two: killed, hung, stopped, told to end, or not what the other one is.

Ranks are forked from a server that has imported torch once; torchrun's import it anew in each attempt.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from core import checkpoint, communication, machine
from core.communication import ranks_in_words
from core.data.corpus import Corpus
from core.data.loader import Loader
from core.pulse import Heard, standing
from core.stopping import Stopped, one_sentence
from tests.test_processes import CONTEXT, together, trained
from tests.test_train import ROOT, events, final_tensors, losses, run

PLAIN = ["--eval-every", "None", "--sample-every", "None"]


def ends(tmp_path, work, *args, release=None, first=0):
    """(exit status, standard error) of two ranks that run work(*args) as a program. release: called when rank `first`
    has ended, with the other's process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    said = [tmp_path / f"stderr-{rank}" for rank in range(2)]
    ranks = [CONTEXT.Process(target=_program, args=(rank, port, said[rank], work, args)) for rank in range(2)]
    for process in ranks:
        process.start()
    ranks[first].join(60)
    if release:
        release(ranks[1 - first])
    ranks[1 - first].join(60)
    return [(process.exitcode, path.read_text()) for process, path in zip(ranks, said)]


def _program(rank, port, stderr, work, args):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    fd = os.open(stderr, os.O_WRONLY | os.O_CREAT)
    os.dup2(fd, 2)
    sys.stdout, sys.stderr = open(os.devnull, "w"), sys.__stderr__
    with one_sentence():
        work(*args)


def at_step(step, fault, rank="1"):
    """`fault()` where rank 1, or the one given, asks for the data of `step`."""
    honest, asked = Loader.next_step, []

    def next_step(self):
        asked.append(self)
        if len(asked) == step + 1 and os.environ["RANK"] == rank:
            fault()
        return honest(self)

    Loader.next_step = next_step


# a rank that is killed

PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch, train
from core import checkpoint
from core.stopping import one_sentence

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def first(what):
    died = Path(sys.argv[1]) / what
    return not died.exists() and not died.touch()

if os.environ["RANK"] == "1":  # in the middle of step 6: of its two micro-steps, the second one's backward
    honest, made = torch.Tensor.backward, []
    def backward(*args, **options):
        made.append(1)
        if len(made) == 14 and first("in-a-step"):
            die()
        return honest(*args, **options)
    torch.Tensor.backward = backward
else:  # in the middle of the save of step 8: tensors are there, the state and the name are not
    written = checkpoint.write_json
    def write_json(path, *args):
        if path.name == "state.json" and "000008" in str(path) and first("in-a-save"):
            die()
        return written(path, *args)
    checkpoint.write_json = write_json
with one_sentence():
    train.main(sys.argv[2:])
"""


def test_killed_in_a_step_and_in_a_save_the_run_ends_with_the_bits_of_an_unharmed_one(tiny, tmp_path):
    """Two nodes, a torchrun each, that keep one store over three attempts and count them differently."""
    (tmp_path / "program.py").write_text(PROGRAM)
    argv = [*tiny, *PLAIN, "--save-every", "4", "--device-batch-size", "4"]
    harmed, whole = tmp_path / "harmed", tmp_path / "whole"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{s.getsockname()[1]}", "--max-restarts=3"]
    program = [str(tmp_path / "program.py"), str(tmp_path), *argv, "--out", str(harmed), "--resume", "auto"]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", *meet, *program],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    errors = [node.communicate(timeout=280)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    assert (tmp_path / "in-a-step").exists() and (tmp_path / "in-a-save").exists()
    assert sum(error.count("exitcode: -9") for error in errors) == 2
    assert [e["step"] for e in events(harmed, "resume")] == [4]  # of both: the log is cut back to the checkpoint
    assert together(trained, [*argv, "--out", str(whole)]) == [None, None]
    assert losses(harmed) == losses(whole) and sorted(losses(whole)) == list(range(12))
    a, b = final_tensors(harmed), final_tensors(whole)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def dies_at(step, argv):
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train.main(argv)


def test_who_is_killed_is_named(tiny, tmp_path):
    argv = [*tiny, *PLAIN, "--save-every", "2", "--no-async-save", "--step-timeout", "4"]
    argv += ["--out", str(tmp_path / "run")]
    (status, said), (killed, _) = ends(tmp_path, dies_at, 3, argv)
    assert killed == -signal.SIGKILL and status == 1 and said.count("\n") == 1, said
    assert "error: training stopped at step 3: rank 1 of 2 has ended (" in said and "step_000002" in said
    assert events(tmp_path / "run", "stop")[-1]["reason"].startswith("rank 1 of 2 has ended")


# a rank that hangs


def sleeps_at(step, argv):
    at_step(step, lambda: time.sleep(600))
    train.main(argv)


def test_a_rank_that_hangs_is_named_with_its_step_within_the_timeout(tiny, tmp_path):
    out = tmp_path / "run"
    argv = [*tiny, *PLAIN, "--save-every", "2", "--step-timeout", "2", "--out", str(out)]
    both = ends(tmp_path, sleeps_at, 3, argv)
    why = "nothing moves for 2 s (--step-timeout): rank 1 of 2 is in the data of step 3; the others wait in the "
    why += "communication of step 3"
    for status, said in both:
        assert status == 1 and (f"training stopped at step 3: {why}" in said or f"has ended ({why})" in said), said
    assert both[0][1].count("\n") == 1 and "step_000002" in both[0][1]
    assert "in sleeps_at" in both[1][1] or "in <lambda>" in both[1][1]  # where it hangs
    stopped = events(out, "stop")[-1]
    assert why in stopped["reason"] and stopped["time"] - events(out, "checkpoint")[-1]["time"] < 10
    train.main(["--resume", str(out)])
    assert sorted(losses(out)) == list(range(12))


def freezes_at(step, argv, rank="1"):
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGSTOP), rank)
    train.main(argv)


def test_a_rank_that_is_stopped_altogether_is_named_by_the_others(tiny, tmp_path):
    argv = [*tiny, *PLAIN, "--save-every", "2", "--step-timeout", "2", "--out", str(tmp_path / "run")]
    (status, said), _ = ends(tmp_path, freezes_at, 3, argv, release=lambda process: process.kill())
    assert status == 1 and said.count("\n") == 1, said
    # its last word may be older than its place
    assert "(--step-timeout): rank 1 of 2 " in said and "says nothing any more; the others wait in the comm" in said


def test_where_all_met_may_stand_still_as_well(tiny, tmp_path):
    """Rank 0 holds the store: calls of the others to it do not return."""
    argv = [*tiny, *PLAIN, "--save-every", "2", "--step-timeout", "2", "--out", str(tmp_path / "run")]
    _, (status, said) = ends(tmp_path, freezes_at, 3, argv, "0", release=lambda process: process.kill(), first=1)
    assert status == 1 and said.count("\n") == 1, said
    assert "(--step-timeout): the process or node where all ranks met does not answer; this rank waits in the " in said


def other_size(argv):
    os.environ["WORLD_SIZE"] = str(2 + int(os.environ["RANK"]))
    communication.REPLACED_SECONDS = 1
    train.main(argv)


def test_processes_of_two_runs_do_not_wait_for_each_other(tiny, tmp_path):
    (status, said), (other, quiet) = ends(tmp_path, other_size, [*tiny, "--out", str(tmp_path / "run")])
    assert (status, other, quiet) == (2, 2, "")
    assert "rank 1 was started as one of 3 processes, rank 0 as one of 2; start all processes with torchrun" in said
    assert not (tmp_path / "run").exists()


def slow_look(argv):
    honest = train.evaluate

    def evaluate(*args):
        time.sleep(2.5)
        return honest(*args)

    train.evaluate = evaluate
    train.main(argv)


def test_the_timeout_is_of_steps_alone(tiny, tmp_path):
    argv = [*tiny, "--steps", "3", "--eval-every", "2", "--step-timeout", "1", "--out", str(tmp_path / "run")]
    assert ends(tmp_path, slow_look, argv) == [(0, ""), (0, "")]


def test_who_is_behind():
    ahead, late = Heard(9, (7, 5), "communication"), Heard(9, (7, 2), "compute")
    assert standing([], [ahead, ahead]) == (
        "all 2 ranks are in the communication of step 7: their GPUs or the network stand still"
    )
    assert standing([1], [ahead, ahead]) == "rank 1 of 2 says nothing any more, all are in the communication of step 7"
    assert standing([], [late, ahead, late, late]) == (
        "ranks 0, 2-3 of 4 are in the forward and backward of step 7; the others wait in the communication of step 7"
    )
    older, none = Heard(2, (6, 9), "optimizer"), Heard(3, None, "")
    assert standing([0], [older, ahead, none, None]) == (
        "rank 0 of 4 is in the optimizer of step 6 and says nothing any more, ranks 2-3 of 4 are in no step; the "
        "others wait in the communication of step 7"
    )
    assert [ranks_in_words(r) for r in ([3], [2, 0], [0, 1, 2, 5])] == ["rank 3", "ranks 0, 2", "ranks 0-2, 5"]


# a rank that is told to end


def test_from_signal_to_checkpoint_it_takes_a_step_and_a_save(tiny, tmp_path, monkeypatch):
    step, save, out, made = train.train_step, checkpoint.save, tmp_path / "run", []

    def noted_step(trainer, n, stop):
        if n == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        made.append(("step", time.monotonic()))
        return step(trainer, n, stop)

    monkeypatch.setattr(train, "train_step", noted_step)
    saves = lambda *args, **options: (save(*args, **options), made.append(("save", time.monotonic())))  # noqa: E731
    monkeypatch.setattr(checkpoint, "save", saves)
    with pytest.raises(
        Stopped, match=r"SIGTERM after 4 of 12 steps, [\d.]+ s after the signal; .*step_000004 is saved"
    ):
        run(tiny, out, *PLAIN, "--save-every", "12")
    ended = time.monotonic()
    assert [what for what, _ in made] == 4 * ["step"] + ["save"]
    (stopped,), saved = events(out, "stop"), events(out)[-1]
    (_, begun), (_, written) = made[-2:]
    assert stopped["event"] == "stop" and 0 < stopped["after_signal_s"] < saved["after_signal_s"]
    assert saved["event"] == "stopped" and written - begun - 2e-3 < saved["after_signal_s"] < ended - begun + 0.5


@pytest.mark.parametrize("where", ["evaluation", "samples", "save"])
def test_a_look_is_broken_off_and_no_step_is_begun(tiny, tmp_path, monkeypatch, where):
    out, asked = tmp_path / "run", []

    def signalled(*args, **options):
        asked.append(args)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        assert where == "save" or len(asked) < 4
        return honest(*args, **options)

    if where == "evaluation":
        owner, name = train.GPT, "hidden"
        monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("a step"))
        options = ["--eval-every", "5", "--eval-tokens", "5000", "--device-batch-size", "2"]
    elif where == "samples":
        owner, name = train, "sample_texts"
        options = ["--sample-every", "3", "--eval-every", "None"]
    else:
        owner, name = checkpoint, "save"
        options = [*PLAIN, "--save-every", "3", "--no-async-save"]
    honest = getattr(owner, name)
    monkeypatch.setattr(owner, name, signalled)
    after = {"evaluation": 0, "samples": 6, "save": 6}[where]
    with pytest.raises(Stopped, match=f"SIGTERM after {after} of 12 steps"):
        run(tiny, out, *options)
    assert checkpoint.step_of(checkpoint.find(out)) == after
    assert not [e for e in events(out, "eval") if e["step"] == after]
    if where == "save":
        assert len(asked) == 2  # what was saved is not saved again
    monkeypatch.undo()
    train.main(["--resume", str(out)])
    assert sorted(losses(out)) == list(range(12))
    if where == "samples":
        assert [e["step"] for e in events(out, "sample")] == [3, 6, 9, 12]


# ranks that are not alike


def differs(argv, what):
    if os.environ["RANK"] == "1":
        if what == "code":
            machine.sources_digest = lambda: "0123456789ab"
        elif what == "torch":
            machine.versions = lambda: {"python": "3.11.7", "torch": "2.9.0", "triton": "3.6.0"}
        elif what == "data":
            honest = Corpus.__init__

            def other(self, *args, **options):
                honest(self, *args, **options)
                self.fingerprint = "abc"

            Corpus.__init__ = other
        else:
            argv = [*argv, *what.split()]
    train.main(argv)


@pytest.mark.parametrize(
    "what, says",
    [
        ("--matrix-lr 0.03", "differ in --matrix-lr: 0.02 on rank 0, 0.03 on rank 1; "),
        ("--kernels ref", "differ in --kernels: auto on rank 0, ref on rank 1; "),
        ("code", "differ in the code (a hash of its sources): {digest} on rank 0, 0123456789ab on rank 1; "),
        ("torch", "differ in torch: {torch} on rank 0, 2.9.0 on rank 1; "),
        ("data", "differ in the text of --data (its fingerprint): "),
    ],
)
def test_ranks_that_differ_are_refused_in_one_sentence(tiny, tmp_path, what, says):
    argv = [*tiny, "--matrix-lr", "0.02", "--out", str(tmp_path / "run")]
    (status, said), other = ends(tmp_path, differs, argv, what)
    says = says.format(digest=machine.sources_digest(), torch=torch.__version__)
    assert status == 2 and said.startswith("error: processes ") and says in said and said.count("\n") == 1, said
    assert other == (2, "") and not (tmp_path / "run").exists()


def test_paths_of_machines_may_differ(tiny, tmp_path, corpus_dir):
    (tmp_path / "elsewhere").symlink_to(corpus_dir)
    options = ["--steps", "1", "--out", str(tmp_path / "run")]
    what = f"--cache-dir {tmp_path / 'cache'} --core-bundle none"
    assert ends(tmp_path, differs, [*tiny, *PLAIN, *options], what) == [(0, ""), (0, "")]


def test_the_digest_is_that_of_every_source(tmp_path, monkeypatch):
    digests = {machine.sources_digest()}
    honest = Path.read_bytes
    for name in ("train.py", "core/run.py", "core/data/loader.py", "kernels/rms_norm.py", "csrc/redline.h"):
        monkeypatch.setattr(Path, "read_bytes", lambda p, n=name: honest(p) + b" " * (p == ROOT / n))
        digests.add(machine.sources_digest())
    assert len(digests) == 6
