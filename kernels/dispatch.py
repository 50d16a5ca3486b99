"""Which backend each op runs on.

Every op still runs its PyTorch reference: no op has a Triton or CUDA backend yet, so a forced one is refused.
"""

BACKENDS = ("ref", "triton", "cuda")


def resolve(request: str) -> dict[str, str]:
    """What `--kernels` request (auto, a backend, or op=backend pairs separated by commas) comes to; ValueError if it cannot."""
    for part in request.split(","):
        op, _, backend = part.strip().rpartition("=")
        if op:
            raise ValueError(
                f"--kernels {request}: there is no op {op!r} with backends to choose from; use auto or ref"
            )
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"--kernels {request}: unknown backend {backend!r}; expected auto, {', '.join(BACKENDS)}")
        if backend not in ("auto", "ref"):
            raise ValueError(f"--kernels {request}: no op has a {backend} backend yet; use auto or ref (PyTorch)")
    return {"requested": request, "backend": "ref"}
