"""Datasets of the hub: what is fetched, checked, waited for and read, from a stand-in for the hub."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import train
from core.data import download
from core.data.download import Shards, main, shards_for
from core.data.loader import Loader
from core.data.shards import ShardCorpus, open_dataset, open_validation_shard
from core.data.tokenizer import train_tokenizer
from core.stopping import UserError
from eval import main as eval_main
from tests.hub import DOCUMENTS, Hub, serving
from tests.test_core_metric import write_bundle
from tests.test_run import TORCHRUN
from tests.test_train import ROOT, events, losses

FIRST, SECOND, THIRD, LAST = (f"shard_{i:05d}.parquet" for i in range(4))


@pytest.fixture
def hub(monkeypatch):
    sleep = time.sleep
    monkeypatch.setattr(download.time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    with serving(Hub()) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def fetched(shards):
    shards.fetch(print)
    return [shards.wait(shard) for shard in shards.wanted]


# how many


@pytest.mark.parametrize(
    "tokens, crops, num", [(5_838_471_168, True, 168), (5_838_471_168, False, 108), (1, True, 1), (10**15, True, 6542)]
)
def test_as_many_shards_as_the_horizon_needs(tokens, crops, num):
    """5.84 B tokens are those of depth 24 at ratio 8, for which nanochat takes 170 shards."""
    assert shards_for("climbmix", tokens, crops=crops) == num


def test_only_what_is_needed_is_fetched(hub, tmp_path):
    shards = Shards("climbmix", 2, tmp_path)
    assert [s.name for s in shards.wanted] == [LAST, FIRST, SECOND] and shards.missing() == shards.wanted
    size = sum(len(hub.files[name]) for name in (LAST, FIRST, SECOND))
    assert (
        f"2 of 6,542 shards to train on and one to validate for 1 B tokens: {size / 1e9:.2f} GB"
        in shards.announcement(10**9)
    )
    paths = fetched(shards)
    assert [path.read_bytes() for path in paths] == [hub.files[path.name] for path in paths]
    assert sorted(hub.asked) == [FIRST, SECOND, LAST] and not shards.missing()
    again = Shards("climbmix", 3, tmp_path)
    fetched(again)
    assert sorted(hub.asked) == [FIRST, SECOND, THIRD, LAST]  # and nothing twice
    assert "0.00 GB are to be fetched" in again.announcement()


def test_a_disk_without_room_is_refused(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match="to be fetched into .*make room, or set --cache-dir"):
        Shards("climbmix", 2, tmp_path).announcement()


# faults


@pytest.mark.parametrize("faults", [["drop"], [500, 429], ["damage"], ["drop", "damage", 503]], ids=str)
def test_a_shard_arrives_whole_in_spite_of(hub, tmp_path, faults, capsys):
    hub.faults[FIRST] = list(faults)
    shards = Shards("climbmix", 1, tmp_path)
    assert fetched(shards)[1].read_bytes() == hub.files[FIRST]
    assert ("came damaged" in capsys.readouterr().out) == ("damage" in faults)
    assert sorted(p.name for p in shards.folder.glob("*.parquet")) == [FIRST, LAST]


@pytest.mark.parametrize("fault, said", [(404, "cannot be fetched"), ("damage", "sha256 is not what the hub says")])
def test_a_shard_that_does_not_come_is_a_sentence(hub, tmp_path, fault, said):
    hub.faults[SECOND] = [fault] * 99
    shards = Shards("climbmix", 2, tmp_path)
    shards.fetch(print)
    second = shards.train[1]
    with pytest.raises(UserError, match=f"{SECOND} of karpathy/climbmix-400b-shuffle .*{said}|{said}"):
        shards.wait(second)
    reader = Shards("climbmix", 2, tmp_path)  # another process, which only reads
    with pytest.raises(UserError, match=SECOND):
        reader.wait(second)
    assert not shards.path(second).exists()


def test_two_runs_with_one_cache_fetch_side_by_side(hub, tmp_path, monkeypatch):
    """Also where checking takes as long as it does for large files."""
    honest = Shards._is_right
    monkeypatch.setattr(Shards, "_is_right", lambda self, *a: (time_to_hash(), honest(self, *a))[1])
    both = [Shards("climbmix", 3, tmp_path) for _ in range(2)]
    for shards in both:
        shards.fetch(print)
    for shards in both:
        assert [shards.wait(shard).read_bytes() for shard in shards.wanted] == [
            hub.files[s.name] for s in shards.wanted
        ]
    assert sorted(hub.asked) == [FIRST, SECOND, THIRD, LAST] and not list(both[0].folder.glob(".*.failed"))


def time_to_hash():
    threading.Event().wait(0.1)


def test_the_hub_may_refuse(hub, tmp_path):
    hub.refuses = 403
    with pytest.raises(UserError, match="the hub refuses it .403"):
        Shards("climbmix", 2, tmp_path)


def test_a_shard_that_was_damaged_here_is_fetched_again(hub, tmp_path, capsys):
    shards = Shards("climbmix", 2, tmp_path)
    path = fetched(shards)[1]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert fetched(Shards("climbmix", 2, tmp_path))[1].read_bytes() == hub.files[FIRST]
    assert f"{path} is not what the hub has" in capsys.readouterr().out and hub.asked.count(FIRST) == 2


def test_without_a_network_what_is_here_is_enough(hub, tmp_path, monkeypatch):
    before = Shards("climbmix", 2, tmp_path)
    fetched(before)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    again = Shards("climbmix", 2, tmp_path)
    assert again.commit == before.commit and len(fetched(again)) == 3


def test_without_a_network_files_put_there_by_hand_are_taken(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    last = "shard_06542.parquet"
    with pytest.raises(UserError, match=rf"put {FIRST}, {SECOND}, {last} of .* into {tmp_path / 'data' / 'climbmix'}"):
        Shards("climbmix", 2, tmp_path)
    with pytest.raises(UserError, match=f"put {FIRST} to shard_00008.parquet, {last} of"):
        Shards("climbmix", 9, tmp_path)
    folder = tmp_path / "data" / "climbmix"
    folder.mkdir(parents=True)
    for name, content in ((FIRST, FIRST), (SECOND, SECOND), (last, LAST)):
        (folder / name).write_bytes(hub.files[content])
    train_text, val = open_dataset("climbmix", tokens=1, crops=True, seed=0, cache_dir=tmp_path, say=print)
    assert train_text[0].startswith("0:0 ") and val[0].startswith("3:0 ")


# reading


def test_documents_come_in_order_and_go_round(hub, tmp_path):
    shards = Shards("climbmix", 2, tmp_path)
    shards.fetch(print)
    corpus = ShardCorpus(shards, seed=3)
    n = 2 * DOCUMENTS
    names = [f"{i // DOCUMENTS}:{i % DOCUMENTS}" for i in range(n)]
    assert [corpus.at(p).split()[0] for p in range(2 * n + 1)] == names + names + names[:1]
    assert [text.split()[0] for text in corpus] == names and len(corpus) == n
    with pytest.raises(IndexError):
        corpus[n]


def test_reading_begins_before_the_last_shard_is_there(hub, tmp_path):
    hub.faults[SECOND] = ["wait"]
    shards = Shards("climbmix", 2, tmp_path)
    shards.fetch(print)
    corpus = ShardCorpus(shards, seed=0)
    assert corpus.at(DOCUMENTS - 1).startswith(f"0:{DOCUMENTS - 1} ") and len(corpus) == 2 * DOCUMENTS
    later = threading.Timer(0.3, hub.release.set)
    later.start()
    assert corpus.at(DOCUMENTS).startswith("1:0 ")


def test_closing_ends_a_wait(hub, tmp_path):
    hub.faults[FIRST] = ["wait"]
    shards = Shards("climbmix", 1, tmp_path)
    shards.fetch(print)
    corpus = ShardCorpus(shards, seed=0)
    threading.Timer(0.2, corpus.close).start()
    with pytest.raises(InterruptedError):
        corpus.at(0)


def test_a_thousand_shards_open_in_no_time(hub, tmp_path):
    content = hub.files[FIRST]
    folder = tmp_path / "data" / "climbmix"
    folder.mkdir(parents=True)
    names = [f"shard_{i:05d}.parquet" for i in range(1001)]
    hub.files = dict.fromkeys(names, content)
    for name in names:
        (folder / name).write_bytes(content)
    started = time.process_time()
    train_text, val = open_dataset("climbmix", tokens=10**10 * 4, crops=False, seed=0, cache_dir=tmp_path, say=print)
    assert train_text.at(5) and len(val) == DOCUMENTS and len(train_text._shards.train) == 736
    assert time.process_time() - started < 3 and not hub.asked


def test_validation_alone_fetches_one_shard(hub, tmp_path):
    found, val = open_validation_shard("climbmix", seed=0, cache_dir=tmp_path, say=print)
    assert hub.asked == [LAST] and val[0].startswith("3:0 ")
    assert found == ShardCorpus(Shards("climbmix", 1, tmp_path), seed=0).fingerprint


def test_a_resumed_loader_reads_on_with_more_shards(hub, tmp_path):
    def loader(num, state=None):
        shards = Shards("climbmix", num, tmp_path)
        shards.fetch(print)
        options = {"seq_len": 64, "rows_per_step": 8, "device_batch_size": 4, "num_streams": 4, "buffer_docs": 3}
        return Loader(ShardCorpus(shards, seed=0), tokenizer, mode="crop", state=state, **options)

    texts = [f"word{i} more" for i in range(50)]
    tokenizer = train_tokenizer(texts, 300)
    with loader(3) as whole:
        steps = [whole.next_step()[0].numpy() for _ in range(12)]
    with loader(2) as first:
        for _ in range(5):
            first.next_step()
        state = json.loads(json.dumps(first.state()))
    with loader(3, state) as rest:
        for step in steps[5:]:
            np.testing.assert_array_equal(rest.next_step()[0].numpy(), step)


# programs

PACE = "--depth 2 --aspect-ratio 16 --d-head 16 --seq-len 64 --vocab-size 300 --total-batch-size 1024 --steps 6".split()
PACE += "--eval-every 3 --eval-tokens 500 --sample-tokens 4 --device cpu".split()


@pytest.fixture
def bundle_url(hub, tmp_path):
    """CORE's tasks in small, as the archive that they come in."""
    folder = tmp_path / "zipped" / "eval_bundle"
    folder.mkdir(parents=True)
    write_bundle(folder, num_examples=6)
    archive = shutil.make_archive(str(tmp_path / "bundle"), "zip", folder.parent)
    hub.others["/eval_bundle.zip"] = Path(archive).read_bytes()
    return f"{hub.url}/eval_bundle.zip"


def test_one_command_fetches_trains_scores_and_reports(hub, bundle_url, tmp_path, capsys):
    """And two processes do what one does."""
    argv = ["gpt2", *PACE, "--core-every", "4", "--core-bundle", bundle_url, "--cache-dir", str(tmp_path / "cache")]
    one, two = tmp_path / "one", tmp_path / "two"
    train.main([*argv, "--out", str(one)])
    shown = capsys.readouterr().out
    assert "climbmix: 1 of 6,542 shards to train on and one to validate" in shown and "CORE" in shown
    assert sorted(hub.asked) == [FIRST, LAST] and len(losses(one)) == 6
    summary = json.loads((one / "summary.json").read_text())
    assert 0 < summary["val_bpb_packed"] < 10 and "packed rows of 64" in (one / "report.md").read_text()
    assert summary["core_tasks"].keys() == {"choice", "long", "schema", "words"}
    assert [e["step"] for e in events(one, "core")] == [4, 6] and "## CORE" in (one / "report.md").read_text()

    # two, with a cache of their own
    argv[-1] = str(tmp_path / "other cache")
    done = subprocess.run(
        [*TORCHRUN, str(ROOT / "train.py"), *argv, "--out", str(two)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(hub.asked) == [FIRST, FIRST, LAST, LAST]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert json.loads((two / "summary.json").read_text())["core"] == pytest.approx(summary["core"], abs=0.3)

    # what was fetched is enough from here on
    hub.shutdown()
    capsys.readouterr()
    eval_main([str(one), "--metrics", "core,bpb", "--core-bundle", bundle_url, "--json", "--device", "cpu"])
    again = json.loads(capsys.readouterr().out)
    assert again["val_bpb"] == pytest.approx(summary["val_bpb"], rel=1e-6) and again["core"] == summary["core"]


def test_a_download_that_is_killed_goes_on(hub, tmp_path):
    hub.faults[SECOND] = ["wait"]
    command = [sys.executable, "-m", "core.data.download", "climbmix", "--shards", "3", "--cache-dir", str(tmp_path)]
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"HF_ENDPOINT": hub.url}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not {FIRST, THIRD, LAST} <= {p.name for p in (tmp_path / "data" / "climbmix").glob("*.parquet")}:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    hub.release.set()
    main(["climbmix", "--shards", "3", "--cache-dir", str(tmp_path)])
    assert sorted(hub.asked) == [FIRST, SECOND, SECOND, THIRD, LAST]
    for path in (tmp_path / "data" / "climbmix").glob("*.parquet"):
        assert path.read_bytes() == hub.files[path.name]
