"""A trained model as a folder that others can use: written by `eval.py RUN --export`, read by `load_exported` and by
transformers.

    config.json, generation_config.json   every size, switch and constant
    model.safetensors       a tensor for each matrix of each layer, in the type that was trained
    modelling_redline.py    the model in plain PyTorch, for AutoModelForCausalLM with trust_remote_code=True
    tokenizer.json, tokenizer_config.json   the tokenizer for AutoTokenizer, which opens each text with the BOS token
    tiktoken/               the same as Redline reads it
    README.md               the model card

The ids of both tokenizers agree, but within half a million white-space characters in a row. The folder is written under
a dotted name and renamed: it is whole or not there.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.config import ModelConfig
from core.data.tokenizer import Tokenizer
from core.layers import ROPE_BASE
from core.models.gpt2 import GPT, QK_SCALE, SMEAR_CHANNELS, VE_GATE_CHANNELS, VE_GATE_RANGE
from core.share.model_card import model_card
from core.share.tokenizer_json import tokenizer_files
from core.stopping import UserError, naming
from kernels.dispatch import Backends
from kernels.rms_norm import EPS

MODEL_TYPE = "redline"
MODELLING = Path(__file__).with_name("modelling_redline.py")


def check_free(folder: Path) -> None:
    """UserError unless `folder` is not there or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--export {folder}: something is there already; remove it, or give another folder")


def export(folder: Path, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype, summary: dict[str, Any] | None) -> None:
    """Writes the folder, which must be free; an OSError names it, and leaves nothing there. dtype: of the matrices.
    summary: of the run whose last weights these are, for the model card."""
    tmp = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    with naming(folder):
        try:
            tmp.mkdir(parents=True)
            tensors = {name: t.contiguous().cpu() for name, t in _matrices(model)}
            save_file(tensors, tmp / "model.safetensors", metadata={"format": "pt"})
            ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.bos_id}
            files = tokenizer_files(tokenizer, model.dims.seq_len)
            files["config.json"] = _config(model, dtype) | ids
            files["generation_config.json"] = ids | {"pad_token_id": tokenizer.bos_id}
            for name, content in files.items():
                (tmp / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            tokenizer.save(tmp / "tiktoken")
            shutil.copyfile(MODELLING, tmp / MODELLING.name)
            (tmp / "README.md").write_text(model_card(model, dtype, summary), encoding="utf-8")
            for file in tmp.iterdir():  # that of the weights is its writer's alone
                if file.is_file():
                    file.chmod(0o644)
            os.replace(tmp, folder)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def _config(model: GPT, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": ["RedlineForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{MODELLING.stem}.RedlineConfig",
            "AutoModelForCausalLM": f"{MODELLING.stem}.RedlineForCausalLM",
        },
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": False,
        **asdict(model.dims),
        "switches": asdict(model.cfg),
        "eps": EPS,
        "rope_base": ROPE_BASE,
        "qk_scale": QK_SCALE,
        "smear_channels": SMEAR_CHANNELS,
        "ve_gate_channels": VE_GATE_CHANNELS,
        "ve_gate_range": VE_GATE_RANGE,
    }


def _matrices(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """Name and weights of each parameter and, of banks, of each layer's matrix."""
    counts: dict[str, int] = {}
    for row in model.table:
        p = model.get_parameter(row.name).detach()
        kind, _, number = row.name.partition(".")
        for matrix in p if number else [p]:
            i = counts[kind] = counts.get(kind, -1) + 1
            yield (f"{kind}.{i}" if number else kind), matrix


def is_exported(folder: Path) -> bool:
    return (folder / MODELLING.name).exists() and (folder / "config.json").exists()


def load_exported(
    folder: str | Path, device: str | torch.device = "cpu", *, kernels: str = "auto", batch_size: int = 1
) -> tuple[GPT, Tokenizer]:
    """The model, in the types it was trained in, and its tokenizer; UserError naming a file that is missing or
    damaged. kernels: backends of the ops, as for train.py, chosen for batches of batch_size rows."""
    folder = Path(folder)
    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    advice = "export the model again"
    try:
        config = json.loads(config_path.read_bytes())
        cfg, dtype = ModelConfig(**config["switches"]), getattr(torch, config["dtype"])
        stored = load_file(weights_path)
    except OSError as error:
        where = error.filename or weights_path
        raise UserError(f"{where}: cannot be read ({error.strerror or error}); {advice}") from error
    except SafetensorError as error:
        raise UserError(f"{weights_path}: damaged ({error}); {advice}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{config_path}: no config of a model of Redline ({error}); {advice}") from error
    target = torch.device(device)
    with target:
        model = GPT(cfg, Backends(kernels, device=target, dtype=dtype), batch_size)
    for row in model.table:
        p = model.get_parameter(row.name)
        p.data = p.data.to(row.dtype(dtype))
    wanted = dict(_matrices(model))
    forms = [{n: (t.shape, t.dtype) for n, t in tensors.items()} for tensors in (wanted, stored)]
    if forms[0] != forms[1]:
        name = min(n for n in {**wanted, **stored} if forms[0].get(n) != forms[1].get(n))
        raise UserError(f"{weights_path}: {name} is {forms[1].get(name)}, expected {forms[0].get(name)}; {advice}")
    for name, t in wanted.items():
        t.copy_(stored[name])
    model.refresh_copies()
    return model, Tokenizer.load(folder / "tiktoken")


def push(folder: Path, repo: str, say: Callable[[str], None]) -> str:
    """Uploads the folder to the Hugging Face hub, as a model that is made private where it is new. Returns its address.
    UserError where that fails: no token, no network, no right to write."""
    try:
        from huggingface_hub import HfApi, errors, get_token
    except ImportError as error:
        raise UserError(f"--push needs huggingface_hub ({error}): pip install 'redline-lm[hf]'") from error
    if get_token() is None:
        raise UserError(f"--push {repo}: no token of the hub is known here; run `hf auth login`, or set HF_TOKEN")
    # what its HTTP client raises, whichever that is: httpx in huggingface_hub 1, httpx2 in 2
    http_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    api = HfApi()
    try:
        say(f"uploading {folder} to {repo}")
        name = api.create_repo(repo, private=True, exist_ok=True).repo_id
        api.upload_folder(folder_path=folder, repo_id=name, commit_message="Upload a model trained by Redline")
    except (http_error, errors.HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--push {repo}: the hub did not take it ({reason}); {folder} is whole, try again") from error
    return f"https://huggingface.co/{name}"
