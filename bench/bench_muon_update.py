"""Muon around its orthogonalisation: `pytest bench/bench_muon_update.py`. Each backend that can run here, on the banks of the tracks."""

from bench.ops import op_items
from kernels.muon_update import muon_apply, muon_momentum

ITEMS = [*op_items(muon_momentum), *op_items(muon_apply)]


def test_muon_update(record):
    record()
