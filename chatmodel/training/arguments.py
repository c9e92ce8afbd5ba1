"""What can be asked of pretraining, and which plan and which data follow from it?"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from chatmodel.checkpoint import list_checkpoints
from chatmodel.data.shards import BAD_SHARD_POLICIES
from chatmodel.data.store import TokenStore, ensure_token_store
from chatmodel.evaluation.bundle import HOW_TO_GET_BUNDLE, find_place, is_address
from chatmodel.gradients import check_graphs
from chatmodel.kernels.fp8 import check_fp8
from chatmodel.runs import Run, leave_out_neutral
from chatmodel.runtime import UserError, logger
from chatmodel.scaling import RECIPES, RunPlan, check_positive, plan_run

COUNTS = ("eval_every", "eval_tokens", "core_every", "sample_every", "save_every", "log_every", "device_batch_size")
TIMES = ("save_every_minutes", "data_timeout", "rank_timeout")
# Tokens that are stored for each one that is trained on: best-fit rows leave out the ends of long documents.
STORE_SHARES = {"best_fit": 1.5, "best_fit_whole": 1.05, "contiguous": 1.05}
MENTIONED_PASSES = 1.5  # weight decay is planned for text that is read once
CHOICES = {
    "recipe": RECIPES,
    "packing": tuple(STORE_SHARES),
    "on_bad_shard": BAD_SHARD_POLICIES,
    "mixed_precision": ("bf16", "no"),
}


@dataclass
class PretrainArguments:
    """What can be asked of pretraining; None means: as the plan derives it from `depth`."""

    run_dir: Path = field(default=Path("runs/base"), metadata={"help": "The run folder."})
    dataset: str = field(
        default="karpathy/climbmix-400b-shuffle",
        metadata={"help": "A Hub name, a folder of parquet/jsonl/txt files, or 'embedded'."},
    )
    text_column: str = field(default="text", metadata={"help": "The column or field that holds the text."})
    on_bad_shard: str = field(
        default="stop", metadata={"help": "Unreadable files: 'stop', 'skip' (and record it), or 'refetch' (Hub)."}
    )
    depth: int = field(default=12, metadata={"help": "The dial: number of layers; all else follows from it."})
    recipe: str = field(default="chatmodel", metadata={"help": "'chatmodel', or 'seed' for nanochat's of Oct 2025."})
    sequence_length: int = field(default=2048, metadata={"help": "Tokens a row, and the model's context."})
    head_dim: int = field(default=128, metadata={"help": "Channels of an attention head."})
    window_pattern: str | None = field(default=None, metadata={"help": "S (window) and L (full), tiled over layers."})
    tokens_per_parameter: float | None = field(default=None, metadata={"help": "Training tokens a parameter."})
    train_tokens: int | None = field(default=None, metadata={"help": "Overrides the planned number of tokens."})
    max_steps: int | None = field(default=None, metadata={"help": "Overrides the planned number of steps."})
    total_batch_tokens: int | None = field(default=None, metadata={"help": "Tokens a step, over all devices."})
    device_batch_size: int = field(default=32, metadata={"help": "Most rows a device holds at once."})
    auto_batch: bool = field(
        default=False, metadata={"help": "Find the most rows a device can hold at once, by trying; same total batch."}
    )
    lr_fraction: float = field(default=1.0, metadata={"help": "Factor on every planned learning rate."})
    decay_fraction: float = field(
        default=1.0,
        metadata={"help": "Factor on every planned weight decay: more for text read several times."},
    )
    packing: str = field(
        default="best_fit_whole",
        metadata={"help": "Rows: best_fit_whole (long documents continue), best_fit (cropped) or contiguous."},
    )
    documents_apart: bool = field(
        default=False, metadata={"help": "Attend within documents only: as good, and faster with FlashAttention."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of the weights and of the order of documents."})
    mixed_precision: str | None = field(default=None, metadata={"help": "'bf16' or 'no'; by default what is faster."})
    compile: bool | None = field(default=None, metadata={"help": "torch.compile; by default on CUDA only."})
    fp8: bool = field(default=False, metadata={"help": "Linear layers in 8-bit floats; pays from some depth on."})
    cuda_graphs: bool | None = field(
        default=None, metadata={"help": "Replay micro-batches as CUDA graphs; by default where memory has room."}
    )
    eval_every: int = field(default=250, metadata={"help": "Steps between validation measurements."})
    eval_tokens: int = field(default=20 * 2**19, metadata={"help": "Validation tokens of each measurement."})
    eval_bundle: str | None = field(
        default=None, metadata={"help": "CORE bundle (zip, folder or address) for estimates."}
    )
    core_every: int = field(default=2000, metadata={"help": "Steps between CORE estimates, if there is a bundle."})
    core_max_per_task: int = field(default=500, metadata={"help": "Examples a task in those estimates."})
    sample_every: int = field(default=2000, metadata={"help": "Steps between sample completions."})
    save_every: int = field(
        default=500, metadata={"help": "Steps between checkpoints; each measurement and each signal makes one too."}
    )
    save_every_minutes: float = field(default=10.0, metadata={"help": "Most minutes between checkpoints."})
    log_every: int = field(default=10, metadata={"help": "Steps between log lines."})
    data_timeout: float = field(default=300.0, metadata={"help": "Most seconds to wait for a batch."})
    rank_timeout: float = field(default=600.0, metadata={"help": "Most seconds that one rank waits for another."})
    accept_changes: bool = field(
        default=False, metadata={"help": "Go on with a run that was begun with other settings; both are recorded."}
    )
    tracker: str | None = field(default=None, metadata={"help": "'tensorboard', 'wandb' or 'trackio'."})
    dry_run: bool = field(default=False, metadata={"help": "Print the plan and stop."})

    def __post_init__(self) -> None:
        self.run_dir = Path(self.run_dir)
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must be 0 or more")
        if self.eval_tokens < 2:
            raise UserError(
                f"eval_tokens={self.eval_tokens} must be at least 2, as a document's first token is not text"
            )
        check_positive(lr_fraction=self.lr_fraction, **{name: getattr(self, name) for name in TIMES})
        for name, choices in CHOICES.items():
            if getattr(self, name) not in (None, *choices):
                raise UserError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}")
        bundle = self.eval_bundle
        if bundle is not None and not (is_address(bundle) or find_place(bundle).exists()):
            raise UserError(f"eval_bundle {bundle} does not exist; leave it out, or {HOW_TO_GET_BUNDLE}")

    def settings(self) -> dict[str, Any]:
        """What a result depends on, as plain values: a checkpoint holds them, to tell later what was changed."""
        return leave_out_neutral({k: str(v) if isinstance(v, Path) else v for k, v in vars(self).items()})

    def compiles_on(self, kind: str) -> bool:
        """Whether the model is compiled on such a device: "cuda", "mps" or "cpu"."""
        return kind == "cuda" if self.compile is None else self.compile

    def check_device(self, device: torch.device, *, divided: bool) -> None:
        """Refuse what a device cannot do, or what does not go with weights divided among ranks by FSDP."""
        compiled = self.compiles_on(device.type)
        if self.fp8:
            check_fp8(device, compiled=compiled, divided=divided)
        check_graphs(self.cuda_graphs, device, compiled=compiled, divided=divided)
        if self.auto_batch and divided:
            raise UserError("auto_batch cannot try sizes on weights divided by FSDP; set device_batch_size instead")

    def plan(self, vocab_size: int) -> RunPlan:
        """The plan these arguments lead to."""
        return plan_run(
            self.depth,
            vocab_size=vocab_size,
            sequence_length=self.sequence_length,
            recipe=self.recipe,
            head_dim=self.head_dim,
            tokens_per_parameter=self.tokens_per_parameter,
            train_tokens=self.train_tokens,
            max_steps=self.max_steps,
            total_batch_tokens=self.total_batch_tokens,
            window_pattern=self.window_pattern,
            decay_fraction=self.decay_fraction,
        )


@dataclass
class PredictionArguments:
    """What else can be asked of a prediction; a run keeps the one it began with, for its report."""

    hourly_rate: float | None = field(default=None, metadata={"help": "US dollars an hour of the whole machine."})
    device_name: str | None = field(default=None, metadata={"help": "--dry_run for another GPU, e.g. 'RTX 4090'."})
    num_devices: int | None = field(default=None, metadata={"help": "--dry_run for so many of --device_name."})
    vocab_size: int | None = field(default=None, metadata={"help": "--dry_run before there is a tokenizer; 32,768."})
    measure: bool = field(default=False, metadata={"help": "--dry_run by steps of the model itself, not by estimate."})
    plan_json: Path | None = field(default=None, metadata={"help": "--dry_run also writes all it knows here."})

    def check(self, *, dry_run: bool) -> None:
        """Refuse what cannot be or has no meaning."""
        for name in ("device_name", "measure", "plan_json", "vocab_size"):
            if getattr(self, name) not in (None, False) and not dry_run:
                raise UserError(f"{name} is for a dry run; add --dry_run or leave it out")
        for name in ("hourly_rate", "num_devices", "vocab_size"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be greater than 0")
        if self.device_name is None and self.num_devices is not None:
            raise UserError("num_devices is for --device_name; here as many devices count as processes are launched")
        if self.device_name is not None and self.measure:
            raise UserError("measure times this machine's device, and device_name is about another; leave one out")


def open_stores(
    args: PretrainArguments, plan: RunPlan, tokenizer: Any, run: Run, *, is_main: bool = True
) -> tuple[TokenStore, TokenStore]:
    """The token stores a run trains and validates on, built where they are not there yet.

    The main process alone reads them through for damage. Text that will be read several times is mentioned.
    """
    train, validation = ensure_token_store(
        args.dataset,
        tokenizer,
        run.folder("data"),
        max_train_tokens=int(STORE_SHARES[args.packing] * plan.train_tokens),
        max_validation_tokens=args.eval_tokens,
        text_column=args.text_column,
        rebuild=not list_checkpoints(run.checkpoints("base")),
        on_bad_shard=args.on_bad_shard,
        check_hash=is_main,
    )
    passes = count_passes(plan, train)
    if passes > MENTIONED_PASSES:
        tokens = f"{train.num_tokens:,}"
        logger.info("the text has %s tokens and will be read %.1f times; see decay_fraction", tokens, passes)
    return train, validation


def count_passes(plan: RunPlan, store: TokenStore) -> float:
    """How often a run reads each token of its store, on average; what best-fit rows leave out counts as read."""
    return plan.train_tokens / store.num_tokens
