"""README.md of an exported model: what it is, how it was made and what it scored, as far as the run knows."""

from typing import Any

import torch

from core.evals.core_metric import GPT2_CORE
from core.models.gpt2 import GPT

_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{path}", trust_remote_code=True)
ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=32, do_sample=False)[0]))
```

With Redline, which samples with a KV cache: `core.share.export.load_exported("{path}")`
gives the model and its tokenizer."""


def model_card(model: GPT, dtype: torch.dtype, summary: dict[str, Any] | None) -> str:
    """Markdown. summary: summary.json of the run whose last weights these are; None: they are of another step, or the
    run has not ended."""
    d = model.dims
    lines = [
        "---",
        "# license: yours to choose, as the hub spells it (mit, apache-2.0, ...)",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [redline]",
        "---",
        "",
        "# A language model trained by Redline",
        "",
        f"{sum(p.numel() for p in model.parameters()):,} parameters in {d.n_layer} layers of {d.d_model} channels, "
        f"{d.n_head} query and {d.n_kv_head} key/value heads, a context of {d.seq_len:,} tokens, {d.vocab_size:,} "
        f"tokens in the vocabulary, {str(dtype).removeprefix('torch.')}.",
        "It continues text; it was not taught to follow instructions, and what it writes may be false.",
        "",
        "## Use",
        "",
        _USE.format(path="path or name of this model"),
        "",
        "## Scores",
        "",
    ]
    if summary is None:
        return "\n".join([*lines, "Not known: these are not the weights that a finished run was scored with.", ""])
    s = summary
    lines += ["| | |", "|---|--:|", f"| validation, bits per byte | {s['val_bpb']:.4f} |"]
    if "core" in s:
        lines += [f"| CORE (GPT-2: {GPT2_CORE}) | {s['core']:.4f} |"]
        lines += [f"| {name}, accuracy | {task['accuracy']:.4f} |" for name, task in s["core_tasks"].items()]
    lines += ["", f"Validation: {s['val_scope']}."]
    if "core" in s:
        lines.append(f"CORE: {s['core_scope']}.")
    git = s["git"]
    lines += [
        "",
        "## Training",
        "",
        f"- Data: {s['data']}",
        f"- Length: {s['tokens']:,} tokens in {s['steps']:,} steps, {s['flops']:.3g} FLOP",
        f"- Time: {s['total_training_time_s']:.1f} s of training, {s['wall_time_s']:.1f} s in all, on {s['device']}",
        f"- Redline: {git['commit'] + (' with changes' if git['dirty'] else '') if git else 'not a git checkout'}",
    ]
    return "\n".join([*lines, ""])
