"""What one dial decides: from `depth`, every size, batch, learning rate and cost of a pretraining run."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from chatmodel.model import GPTConfig
from chatmodel.runtime import UserError

REFERENCE_TOKENS = 1.32e9  # the horizon at depth 12 that rates and decay were tuned at (karpathy/nanochat@92d63d4)
REFERENCE_BATCH_TOKENS = 2**19  # what its rates were tuned with
BEST_BATCH_TOKENS = 2**17  # at that horizon; measured at depths 6 and 8 (docs/experiments.md)
RATE_EXPONENT = 0.3  # of the batch; the root lowers the rates of small batches too far (docs/experiments.md)
REFERENCE_WIDTH = 768
MAX_WEIGHT_DECAY = 0.6
RECIPES = ("chatmodel", "seed", "compat")


@dataclass(frozen=True)
class GroupPlan:
    """Optimizer settings of one kind of parameter; `betas` are AdamW's (the matrices' momentum is scheduled)."""

    lr: float
    betas: tuple[float, float] = (0.8, 0.95)
    weight_decay: float = 0.0


@dataclass(frozen=True)
class SchedulePlan:
    """How learning rate, momentum and weight decay move over the steps.

    Learning rate: linear over `warmup_steps`, constant, linear over the last `warmdown_steps` to
    `final_lr_fraction`. Momentum of the matrices: from `momentum_start` to `momentum_peak` over
    `momentum_warmup_steps`, to `momentum_final` during the warm-down. Weight decay: cosine to 0 if `cosine_decay`.
    """

    steps: int
    warmup_steps: int
    warmdown_steps: int
    final_lr_fraction: float
    momentum_start: float = 0.85
    momentum_peak: float = 0.97
    momentum_final: float = 0.90
    momentum_warmup_steps: int = 400
    cosine_decay: bool = True


@dataclass(frozen=True)
class RunPlan:
    """Everything a pretraining run is made of, derived once. Tokens and FLOPs are totals over all devices."""

    recipe: str
    depth: int
    model: dict[str, Any]
    parameters: int
    flops_per_token: float
    tokens_per_parameter: float
    train_tokens: int
    total_batch_tokens: int
    steps: int
    total_flops: float
    sequence_length: int
    base_learning_rates: dict[str, float]
    groups: dict[str, GroupPlan]
    schedule: SchedulePlan
    orthogonalization: str
    normalize_updates: bool
    grad_clip: float | None

    def model_config(self, **token_ids: Any) -> GPTConfig:
        """The model's configuration; `token_ids` are what only the tokenizer knows (bos_token_id ...)."""
        return GPTConfig(**self.model, **token_ids)

    def rank_rows(self, world_size: int) -> int:
        """The rows of each rank's part of a step.

        Raises:
            UserError: a step's rows cannot be divided evenly.
        """
        rows = self.total_batch_tokens // self.sequence_length
        if rows % world_size:
            raise UserError(
                f"a step of total_batch_tokens={self.total_batch_tokens} is {rows} rows of {self.sequence_length} "
                f"tokens, which {world_size} processes cannot share evenly; change their number or total_batch_tokens"
            )
        return rows // world_size

    def fit_rows(self, device_batch_size: int, world_size: int) -> int:
        """The most rows, `device_batch_size` at most, that divide each rank's part of a step.

        Raises:
            UserError: there is no such number.
        """
        if device_batch_size < 1:
            raise UserError(f"device_batch_size={device_batch_size} must be at least 1")
        rows = self.rank_rows(world_size)
        return next(size for size in range(min(device_batch_size, rows), 0, -1) if rows % size == 0)

    def accumulation_steps(self, device_batch_size: int, world_size: int) -> int:
        """How many micro-batches of exactly `device_batch_size` rows each rank adds up for one step.

        Raises:
            UserError: the rows cannot be divided evenly.
        """
        if self.fit_rows(device_batch_size, world_size) != device_batch_size:
            raise UserError(
                f"device_batch_size={device_batch_size} does not divide the {self.rank_rows(world_size)} rows of "
                f"{self.sequence_length} tokens that a step has for each process; change it or total_batch_tokens"
            )
        return self.rank_rows(world_size) // device_batch_size

    def describe(self) -> str:
        """The plan in a sentence."""
        return (
            f"{self.recipe} recipe at depth {self.depth}: {self.parameters:,} parameters, {self.steps:,} steps of "
            f"{self.total_batch_tokens:,} tokens, {self.train_tokens:,} tokens in all, {self.total_flops:.3e} FLOPs"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `plan.json` and the report."""
        return asdict(self)


def plan_run(
    depth: int,
    *,
    vocab_size: int,
    sequence_length: int = 2048,
    recipe: str = "chatmodel",
    head_dim: int = 128,
    tokens_per_parameter: float | None = None,
    train_tokens: int | None = None,
    max_steps: int | None = None,
    total_batch_tokens: int | None = None,
    window_pattern: str | None = None,
    decay_fraction: float = 1.0,
) -> RunPlan:
    """Derive a run from its depth. None means: as the recipe has it.

    Args:
        tokens_per_parameter: training tokens for each counted parameter: matrices and head for "chatmodel" (12), all
            parameters for "seed" (20).
        train_tokens: overrides that product. max_steps: overrides the number of steps, and so the tokens.
        decay_fraction: factor on every weight decay; the recipe's are tuned on text that is read once.

    Raises:
        UserError: a value that no run can have.

    Source: karpathy/nanochat@c75fe54 scripts/base_train.py for "seed"; for "chatmodel" the formulas of 92d63d4 with
    the batch, rates and decay taken at the tokens that will really be trained on, a batch four times smaller, and
    rates that fall more slowly with it.
    """
    check_positive(
        depth=depth,
        vocab_size=vocab_size,
        sequence_length=sequence_length,
        head_dim=head_dim,
        tokens_per_parameter=tokens_per_parameter,
        train_tokens=train_tokens,
        max_steps=max_steps,
        total_batch_tokens=total_batch_tokens,
    )
    if not (decay_fraction >= 0 and math.isfinite(decay_fraction)):
        raise UserError(f"decay_fraction={decay_fraction} must be 0 or more")
    if recipe not in RECIPES:
        raise UserError(f"recipe={recipe!r} is unknown; choose one of {', '.join(RECIPES)}")
    if total_batch_tokens is not None and total_batch_tokens % sequence_length:
        raise UserError(
            f"total_batch_tokens={total_batch_tokens} is no multiple of sequence_length={sequence_length}; "
            "change one of them"
        )
    if window_pattern is not None and (not window_pattern or set(window_pattern) - {"S", "L"}):
        raise UserError(f"window_pattern={window_pattern!r} may only hold the letters S (sliding) and L (full)")
    seed = recipe == "seed"
    model = _model_settings(depth, vocab_size, sequence_length, head_dim, window_pattern, recipe=recipe)
    config = GPTConfig(**model)
    parameters, scaling_parameters = count_parameters(config)
    if seed:
        scaling_parameters = parameters
    ratio = tokens_per_parameter or (20.0 if seed else 12.0)
    tokens = int(train_tokens or ratio * scaling_parameters)
    batch = total_batch_tokens or (REFERENCE_BATCH_TOKENS if seed else _best_batch(tokens, sequence_length))
    steps = max_steps or tokens // batch
    if steps < 1:
        raise UserError(
            f"{tokens} training tokens make less than one step of total_batch_tokens={batch}; raise train_tokens (or "
            "tokens_per_parameter) or lower total_batch_tokens"
        )
    tokens = steps * batch
    width = config.hidden_size
    flops_per_token = count_flops_per_token(config, sequence_length)
    base, groups = _seed_groups(width) if seed else _chatmodel_groups(width, batch, tokens)
    groups = {name: replace(group, weight_decay=decay_fraction * group.weight_decay) for name, group in groups.items()}
    return RunPlan(
        recipe=recipe,
        depth=depth,
        model=model,
        parameters=parameters,
        flops_per_token=flops_per_token,
        tokens_per_parameter=tokens / scaling_parameters,
        train_tokens=tokens,
        total_batch_tokens=batch,
        steps=steps,
        total_flops=float(flops_per_token * tokens),
        sequence_length=sequence_length,
        base_learning_rates=base,
        groups=groups,
        schedule=_seed_schedule(steps) if seed else _chatmodel_schedule(steps),
        orthogonalization="newton_schulz" if seed else "polar_express",
        normalize_updates=not seed,
        grad_clip=1.0 if seed else None,
    )


def check_positive(**numbers: float | None) -> None:
    """Refuse numbers that are neither None nor finite and above 0, by name.

    Raises:
        UserError: the first of them.
    """
    for name, value in numbers.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name}={value} must be greater than 0")


def count_parameters(config: GPTConfig) -> tuple[int, int]:
    """All parameters, and those that the token horizon is counted from: the layers' matrices and the head.

    Gates and scalars are left out of the second number, as they do no work worth counting.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    assert config.intermediate_size is not None
    key_value = config.num_key_value_heads * config.head_dim
    query = config.num_attention_heads * config.head_dim
    mlp = (3 if config.gated_mlp else 2) * width * config.intermediate_size
    matrices = layers * (2 * width * query + 2 * width * key_value + mlp)
    vocabulary = config.vocab_size * width
    value_layers = sum(config.has_value_embedding(index) for index in range(layers))
    gate = min(config.value_gate_channels, width) * config.num_key_value_heads
    extras = value_layers * (config.vocab_size * key_value + gate)
    extras += 2 * layers * config.residual_scalars + int(config.backout)
    embeddings = vocabulary if config.tie_word_embeddings else 2 * vocabulary
    return matrices + embeddings + extras, matrices + vocabulary


def count_flops_per_token(config: GPTConfig, sequence_length: int) -> float:
    """Training FLOPs of one token: 6 per weight that multiplies, 12 per attended position, channel and layer.

    Source: arXiv 2204.02311, appendix B, as karpathy/nanochat counts: a sliding layer attends `sliding_window`
    positions, a full one the whole sequence; looked-up embeddings cost nothing.
    """
    assert config.layer_types is not None
    assert config.head_dim is not None
    _, multiplied = count_parameters(config)
    window = min(config.sliding_window or sequence_length, sequence_length)
    attended = sum(window if kind == "sliding_attention" else sequence_length for kind in config.layer_types)
    return 6.0 * multiplied + 12.0 * config.num_attention_heads * config.head_dim * attended


def _model_settings(
    depth: int, vocab_size: int, sequence_length: int, head_dim: int, window_pattern: str | None, *, recipe: str
) -> dict[str, Any]:
    if recipe == "seed":
        # Width may be no multiple of the head size there: the heads then share it evenly.
        width, heads = 64 * depth, math.ceil(64 * depth / head_dim)
        if width % heads or (width // heads) % 2:
            raise UserError(f"depth={depth} gives the seed recipe {width} channels for {heads} heads; choose another")
    else:
        if head_dim % 2:
            raise UserError(f"head_dim={head_dim} must be even, as channels are turned in pairs")
        heads = math.ceil(64 * depth / head_dim)
        width = heads * head_dim
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "max_position_embeddings": sequence_length,
        "window_pattern": window_pattern or ("SSSL" if recipe == "chatmodel" else "L"),
    }
    if recipe != "chatmodel":
        settings |= {"value_embeddings": False, "residual_scalars": False, "backout": False}
    if recipe == "compat":
        # What is left can be written as a Qwen3 (chatmodel/export/conversions.py). Three matrices instead of two: two
        # thirds of the width keep the MLP's size, in multiples of 64 that fit the blocks of quantised formats.
        settings |= {
            "gated_mlp": True,
            "hidden_act": "silu",
            "intermediate_size": 64 * max(1, round(width / 24)),
            "final_logit_softcapping": None,
        }
    if recipe == "seed":
        settings |= {
            "qk_scale": 1.0,
            "init_scheme": "normal",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        }
    return settings


def _best_batch(tokens: int, sequence_length: int) -> int:
    """Tokens a step, growing with the horizon as tokens^0.383 (arXiv 2505.13738), a power of two of rows."""
    ideal = BEST_BATCH_TOKENS * (tokens / REFERENCE_TOKENS) ** 0.383
    return int(sequence_length * 2 ** max(0, round(math.log2(ideal / sequence_length))))


def _seed_groups(width: int) -> tuple[dict[str, float], dict[str, GroupPlan]]:
    base = {"embedding": 0.2, "head": 0.004, "matrix": 0.02}
    scale = (width / REFERENCE_WIDTH) ** -0.5
    return base, {
        "matrix": GroupPlan(base["matrix"]),
        "embedding": GroupPlan(base["embedding"] * scale),
        "head": GroupPlan(base["head"] * scale),
    }


def _chatmodel_groups(width: int, batch: int, tokens: int) -> tuple[dict[str, float], dict[str, GroupPlan]]:
    base = {
        "matrix": 0.02,
        "embedding": 0.3,
        "value_embedding": 0.15,
        "head": 0.008,
        "residual_scale": 0.005,
        "embedding_scale": 0.5,
        "backout": 0.2,
    }
    by_batch = (batch / REFERENCE_BATCH_TOKENS) ** RATE_EXPONENT
    by_width = (width / REFERENCE_WIDTH) ** -0.5  # the vocabulary's tables
    decay = min(MAX_WEIGHT_DECAY, 0.28 * (batch / REFERENCE_BATCH_TOKENS) ** 0.5 * REFERENCE_TOKENS / tokens)
    return base, {
        "matrix": GroupPlan(base["matrix"] * by_batch, weight_decay=decay),
        "embedding": GroupPlan(base["embedding"] * by_batch * by_width, (0.8, 0.995), 0.001),
        "value_embedding": GroupPlan(base["value_embedding"] * by_batch * by_width, (0.8, 0.995), 0.01),
        "head": GroupPlan(base["head"] * by_batch * by_width, (0.8, 0.96), 0.01),
        "residual_scale": GroupPlan(base["residual_scale"] * by_batch, (0.8, 0.95), 0.05),
        "embedding_scale": GroupPlan(base["embedding_scale"] * by_batch, (0.96, 0.95)),
        "backout": GroupPlan(base["backout"]),
    }


def _seed_schedule(steps: int) -> SchedulePlan:
    return SchedulePlan(
        steps=steps,
        warmup_steps=0,
        warmdown_steps=round(0.2 * steps),
        final_lr_fraction=0.0,
        momentum_peak=0.95,
        momentum_final=0.95,
        momentum_warmup_steps=300,
        cosine_decay=False,
    )


def _chatmodel_schedule(steps: int) -> SchedulePlan:
    return SchedulePlan(
        steps=steps,
        warmup_steps=min(40, steps // 10),
        warmdown_steps=round(0.65 * steps),
        final_lr_fraction=0.05,
        momentum_warmup_steps=min(400, max(1, round(0.2 * steps))),
    )
