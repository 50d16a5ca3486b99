"""Is the Gram form of Polar Express stable in bf16? `python -m bench.gram_newton_schulz` prints a table.

The Gram form iterates on the n x n matrix R = X X^T and multiplies X once at the end, 38 n^3 against 65 n^3 FLOPs at
aspect 4 (kernels/polar_express.py, both with symmetric products). As its authors made it stable: raw coefficients of
Polar Express with a safety of 1.05, a fresh R before the third step, and no identity added inside a product
[gram-newton-schulz, README and alg. 3]. Each entry is the relative error against the recurrence in float64, and the
largest singular value of the result.
"""

import torch
from torch import Tensor

RAW = (
    # [arXiv 2505.16932, five steps]
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
N, M, BATCH = 192, 768, 2


def standard(x: Tensor, coefficients: list[tuple[float, float, float]]) -> Tensor:
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def gram_form(x: Tensor, coefficients: list[tuple[float, float, float]], restart: int) -> Tensor:
    """restart: the step (from 0) before which X is multiplied out and R made afresh."""
    identity = torch.eye(x.size(1), dtype=x.dtype).expand(x.size(0), -1, -1)
    r, q = x @ x.mT, None
    for i, (a, b, c) in enumerate(coefficients):
        if i == restart and q is not None:
            x = q @ x
            r, q = x @ x.mT, None
        z = torch.baddbmm(r, r, r, beta=b, alpha=c)
        q = z + a * identity if q is None else torch.baddbmm(q, q, z, beta=a)
        rz = torch.baddbmm(r, r, z, beta=a)
        r = torch.baddbmm(rz, z, rz, beta=a)
    assert q is not None
    return q @ x


def spectra() -> dict[str, Tensor]:
    return {
        "all equal": torch.ones(N),
        "down to 1e-6": torch.logspace(0, -6, N),
        "rank n/4": torch.cat((torch.ones(N // 4), torch.zeros(N - N // 4))),
        "rank 1": torch.cat((torch.ones(1), torch.zeros(N - 1))),
        "clusters 1, 1e-3": torch.cat((torch.ones(N // 2), 1e-3 * torch.ones(N // 2))),
        "one large": torch.cat((torch.ones(1), 1e-2 * torch.ones(N - 1))),
        "random normal": torch.zeros(0),
    }


def main() -> None:
    torch.manual_seed(0)
    forms = {"standard": standard} | {
        f"Gram, restart before {k + 1}": lambda x, c, k=k: gram_form(x, c, k) for k in (1, 2, 3)
    }
    print(f"{'safety':>6} {'spectrum':<18}", *(f"{name:>24}" for name in forms), f"{'largest exact':>14}")
    for safety in (1.02, 1.05):
        coefficients = [(a / safety, b / safety**3, c / safety**5) for a, b, c in RAW]
        for name, values in spectra().items():
            u, _ = torch.linalg.qr(torch.randn(BATCH, N, N, dtype=torch.float64))
            v, _ = torch.linalg.qr(torch.randn(BATCH, M, N, dtype=torch.float64))
            x = (u * values.double()) @ v.mT if values.numel() else torch.randn(BATCH, N, M, dtype=torch.float64)
            x = (x / (1.01 * torch.linalg.matrix_norm(x, keepdim=True))).bfloat16()
            want = standard(x.double(), coefficients)
            cells = []
            for form in forms.values():
                got = form(x, coefficients).double()
                cells.append(
                    f"{((got - want).norm() / want.norm()).item():>15.3f}, {torch.linalg.svdvals(got).max():7.2f}"
                )
            print(f"{safety:>6} {name:<18}", *cells, f"{torch.linalg.svdvals(want).max():>14.3f}")


if __name__ == "__main__":
    main()
