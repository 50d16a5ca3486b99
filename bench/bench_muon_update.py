"""Muon around its orthogonalisation: `pytest bench/bench_muon_update.py`. Each backend that can run here, on the banks of the tracks."""

from bench.ops import measure_in_place, parameters
from kernels.muon_update import muon_apply, muon_momentum


@parameters(muon_momentum, in_place=True)
def test_muon_momentum(benchmark, backend, case, form):
    measure_in_place(benchmark, muon_momentum, backend, case, form)


@parameters(muon_apply, in_place=True)
def test_muon_apply(benchmark, backend, case, form):
    measure_in_place(benchmark, muon_apply, backend, case, form)
