"""What does nanochat's own code, in a checkout of it, compute for a checkpoint?"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from chatmodel.export.nanochat_checkpoint import SEED_COMMIT
from chatmodel.runtime import UserError, write_json

# Runs in a process of its own, so that nanochat's modules and settings do not reach this one. Commit c75fe54 keeps
# its rotary tables in bf16 and insists on that; they are computed anew in fp32 where they are applied.
PROGRAM = """
import json, sys
root, checkpoint, meta, prompts, output, is_seed = sys.argv[1:]
sys.path.insert(0, root)
import torch
import nanochat.gpt as gpt

settings = json.load(open(meta))["model_config"]
model = gpt.GPT(gpt.GPTConfig(**settings))
model.init_weights()
state = torch.load(checkpoint, map_location="cpu", weights_only=True)
model.load_state_dict({name.removeprefix("_orig_mod."): value.float() for name, value in state.items()})
model.float().eval()
if is_seed == "True":
    apply = gpt.apply_rotary_emb
    def apply_exactly(x, cos, sin):
        steps = torch.arange(0, x.shape[3], 2, dtype=torch.float32) / x.shape[3]
        angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float32), 1.0 / 10000**steps)[None, :, None]
        return apply(x, angles.cos(), angles.sin())
    gpt.apply_rotary_emb = apply_exactly
    for table in ("cos", "sin"):
        setattr(model, table, getattr(model, table).bfloat16())
with torch.inference_mode():
    logits = [model(torch.tensor([prompt])).float()[0] for prompt in json.load(open(prompts))]
torch.save(logits, output)
"""


def nanochat_logits(
    root: Path, checkpoint: Path, prompts: list[list[int]], commit: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function from one of `prompts`, as (1, T), to the logits (1, T, vocab_size) of the code in `root`.

    This runs the code in `root`, in fp32 on the CPU.

    Raises:
        UserError: there is no nanochat in `root`, or it fails.
    """
    if not (root / "nanochat" / "gpt.py").is_file():
        raise UserError(f"{root} is no checkout of nanochat (no nanochat/gpt.py); git clone it there at {commit}")
    meta = checkpoint.with_name(checkpoint.name.replace("model_", "meta_")).with_suffix(".json")
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "prompts.json", Path(folder) / "logits.pt"
        write_json(asked, prompts)
        command = [sys.executable, "-c", PROGRAM, *map(str, (root, checkpoint, meta, asked, answered))]
        outcome = subprocess.run([*command, str(commit == SEED_COMMIT)], capture_output=True, text=True, check=False)
        if outcome.returncode != 0:
            reason = (outcome.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"nanochat in {root} cannot run {checkpoint} ({reason}); check out its commit {commit}")
        logits: list[torch.Tensor] = torch.load(answered, weights_only=True)
    table = {tuple(prompt): rows for prompt, rows in zip(prompts, logits, strict=True)}
    return lambda ids: table[tuple(ids[0].tolist())][None]
