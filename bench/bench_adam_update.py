"""adam_update: `pytest bench/bench_adam_update.py`. Each backend that can run here, on the head and the embeddings of the tracks."""

from bench.ops import measure_in_place, parameters
from kernels.adam_update import adam_update


@parameters(adam_update, in_place=True)
def test_adam_update(benchmark, backend, case, form):
    measure_in_place(benchmark, adam_update, backend, case, form)
