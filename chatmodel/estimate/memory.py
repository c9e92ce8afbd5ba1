"""How much memory does a device need at most, and how much disk does a run?"""

from dataclasses import replace

from chatmodel.estimate.setup import Setup
from chatmodel.kernels.attention_products import count_kept_shares
from chatmodel.losses import CACHED_LOGITS, choose_chunk_tokens
from chatmodel.model import GPTConfig
from chatmodel.scaling import RunPlan, count_parameters

GRADIENT_BYTES = 4  # gradients add up in fp32 (chatmodel/train_step.py)
MASTER_BYTES = 4  # beside weights in bf16, the optimizer keeps the fp32 weights that move
ADAM_BYTES, MUON_BYTES = 8, 4  # two momenta, or one

# Values kept for the backward pass, for each token, layer and channel; and those that come once, not in every layer.
# Plain: counted with saved_tensors_hooks at depths 2 to 6 (tests/test_estimate.py counts again). Compiled: expected,
# as the compiler computes again what is cheap and keeps about the inputs of matrix products and of attention.
PLAIN_LAYER_VALUES, PLAIN_VALUES = 23, 6
COMPILED_LAYER_VALUES, COMPILED_VALUES = 11, 8

# Logits come in chunks of positions, and their gradient takes their place (chatmodel/losses.py). Without CUDA's kernel
# there are two fp32 copies beside, on a CPU of a block of rows at a time.
WORKING_LOGIT_BYTES = 8
# Validation holds the logits of a whole batch, so that more than keeps a GPU busy would decide what memory a run
# needs at most; with the cap three times: before it, and two steps of it.
VALIDATION_BATCH_TOKENS = 8_192
VALIDATION_COPIES, VALIDATION_COPIES_CAPPED = 1, 3
VOCABULARY_GRADIENT_BYTES = 8  # the head's gradient, in fp32, and what is being added to it
# Room for one update of the largest stack of matrices: gradients, updates, and the powers of their products.
UPDATE_BYTES = 24

LIBRARY_BYTES = 600 * 2**20  # of a CPU process: 450 MiB after all imports, and what the libraries work with
CHECKPOINTS_KEPT = 2
PASSING = frozenset({"gradients", "activations", "logits", "head", "update", "validation"})  # not there all the time

# The error of the sum: on a CPU the resident set was 0.97 to 1.10 times the prediction (docs/experiments.md).
MEMORY_FACTOR = 1.25

OFFSET_BYTES = 0.02  # a token, at about 400 tokens a document


def split_parameters(config: GPTConfig) -> tuple[int, int, int]:
    """Parameters that AdamW moves, that Muon moves, and those of Muon's largest stack of one shape."""
    parameters, multiplied = count_parameters(config)
    assert config.intermediate_size is not None
    matrices = multiplied - config.vocab_size * config.hidden_size
    width, layers = config.hidden_size, config.num_hidden_layers
    return parameters - matrices, matrices, layers * width * max(4 * width, config.intermediate_size)


def validation_batch_rows(sequence_length: int) -> int:
    """Rows of a batch of validation, whatever those of training are."""
    return max(1, VALIDATION_BATCH_TOKENS // sequence_length)


def predict_memory(plan: RunPlan, setup: Setup) -> dict[str, int]:
    """Bytes of one device by what they are for; not all are held at once (`peak_bytes`)."""
    config = plan.model_config()
    width, vocabulary = config.hidden_size, config.vocab_size
    *_, stack = split_parameters(config)
    tokens = setup.device_batch_size * plan.sequence_length
    scored = validation_batch_rows(plan.sequence_length) * plan.sequence_length
    layer, once = (COMPILED_LAYER_VALUES, COMPILED_VALUES) if setup.compiled else (PLAIN_LAYER_VALUES, PLAIN_VALUES)
    logits = min(choose_chunk_tokens(vocabulary), tokens) * vocabulary
    working = {"cuda": 0, "cpu": min(CACHED_LOGITS, logits)}.get(setup.device.kind, logits)
    capped = config.final_logit_softcapping is not None
    copies = VALIDATION_COPIES_CAPPED if capped else VALIDATION_COPIES
    shares = setup.num_devices if setup.divided else 1
    parts = {
        "weights": plan.parameters * setup.value_bytes // shares,
        "gradients": plan.parameters * GRADIENT_BYTES // shares,
        "optimizer": _held_optimizer_bytes(plan, setup),
        "activations": tokens * width * (layer * config.num_hidden_layers + once) * setup.value_bytes,
        "logits": logits * setup.value_bytes + working * WORKING_LOGIT_BYTES,
        "head": vocabulary * width * VOCABULARY_GRADIENT_BYTES,
        "update": UPDATE_BYTES * stack // (1 if setup.divided else setup.num_devices),
        "validation": scored * vocabulary * setup.value_bytes * copies,
    }
    if setup.device.kind == "cpu":
        # A checkpoint is copied before it is written; on a GPU that copy is in the memory of the host.
        parts |= {"libraries": LIBRARY_BYTES, "checkpoint copy": checkpoint_bytes(plan, setup)}
        if not setup.compiled:
            parts["activations"] += _attention_bytes(config, setup)
    return parts


def _attention_bytes(config: GPTConfig, setup: Setup) -> int:
    """Of the probabilities that a CPU's attention keeps."""
    assert config.layer_types is not None
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
    shares = sum(count_kept_shares(config.max_position_embeddings, window) for window in windows)
    return setup.device_batch_size * config.num_attention_heads * shares * setup.value_bytes


def peak_bytes(parts: dict[str, int]) -> int:
    """The most that is held at once: what stays, and the most of a micro-batch, an update and a validation batch."""
    micro_batch = parts["gradients"] + parts["activations"] + parts["logits"] + parts["head"]
    return max(_staying_bytes(parts) + max(micro_batch, parts["gradients"] + parts["update"]), validation_bytes(parts))


def validation_bytes(parts: dict[str, int]) -> int:
    """What is held while validation runs, which steps alone do not show."""
    return _staying_bytes(parts) + parts["validation"]


def _staying_bytes(parts: dict[str, int]) -> int:
    return sum(size for name, size in parts.items() if name not in PASSING)


def checkpoint_bytes(plan: RunPlan, setup: Setup) -> int:
    """Of one checkpoint: the weights and the state of the optimizer."""
    return plan.parameters * setup.value_bytes + _optimizer_bytes(plan, setup)


def _optimizer_bytes(plan: RunPlan, setup: Setup) -> int:
    adam, muon, _ = split_parameters(plan.model_config())
    master = MASTER_BYTES if setup.precision == "bf16" else 0
    return adam * (ADAM_BYTES + master) + muon * (MUON_BYTES + master)


def _held_optimizer_bytes(plan: RunPlan, setup: Setup) -> int:
    """Of one device: its part, but with weights divided the whole momentum of Muon, which works on whole matrices."""
    _, muon, _ = split_parameters(plan.model_config())
    whole = muon * MUON_BYTES if setup.divided else 0
    return whole + (_optimizer_bytes(plan, setup) - whole) // setup.num_devices


def predict_disk(plan: RunPlan, setup: Setup) -> dict[str, int]:
    """Bytes on the disk by what they are for; the third checkpoint is there while it replaces the first."""
    token_bytes = (2 if plan.model["vocab_size"] <= 2**16 else 4) + OFFSET_BYTES
    return {
        "token store": int((setup.store_share * plan.train_tokens + setup.eval_tokens) * token_bytes),
        "checkpoints": (CHECKPOINTS_KEPT + 1) * checkpoint_bytes(plan, setup),
        "final model": plan.parameters * setup.value_bytes,
    }


def largest_batch(plan: RunPlan, setup: Setup) -> int | None:
    """The most rows, a power of two that divides the step, that fit in spite of the error; None if none do."""
    rows = plan.total_batch_tokens // (plan.sequence_length * setup.num_devices)
    room = setup.device.memory_bytes / MEMORY_FACTOR
    fitting = [
        size
        for size in (1 << power for power in range(rows.bit_length()))
        if rows % size == 0 and peak_bytes(predict_memory(plan, replace(setup, device_batch_size=size))) <= room
    ]
    return max(fitting, default=None)
