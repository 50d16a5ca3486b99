"""What a training step takes on 8 H100s, from the costs of its ops. A prediction, not a measurement.

A workload lists what one GPU does in one optimizer step, op by op, with FLOPs and bytes. One set of efficiencies,
within published ranges and with sources, serves all workloads; rows follow one another.

machine.py   classes of work, how efficiency depends on shape, rows
peers.py     the check: published steps of nanochat and modded-nanogpt come out within TOLERANCE
redline.py   the budget: the gpt2 preset as core/ runs it today, and as it is meant to become. An H100's or H200's
             `bench/results/<device>/ops.jsonl` replaces the efficiency of the budget rows it has, never the check's
fineweb.py   a step of the race to 3.28 nats by one description for the peers' designs and ours
race.py      these designs as data, the check of the peers', what would make ours faster, lookup tables sent sparsely
scale.py     what a token costs on 1 to many GPUs with the sharded optimizer: lanes of computing and links
report.py    tables, JSON, a plot
Left out     L2 hits (perhaps why the fp8 runs, with many passes over 100 MB, come out slow), falling clocks,
             stragglers, the data loader
"""
