"""Which measurements belong to a stage of a run? Bits per byte, CORE and samples, or what a chat is asked."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import default_collate
from tqdm import tqdm

from chatmodel.conversations.generated import GENERATED_TASKS, WORD_TASKS
from chatmodel.conversations.identity import load_identity
from chatmodel.data.rows import validation_rows
from chatmodel.data.store import TokenStore
from chatmodel.data.words import load_words
from chatmodel.evaluation.bits_per_byte import bits_per_byte, document_bits_per_byte
from chatmodel.evaluation.bundle import HOW_TO_GET_BUNDLE, find_place, is_address
from chatmodel.evaluation.chat_tasks import render_chat_prompt
from chatmodel.evaluation.chatcore import ChatLimits, evaluate_chatcore
from chatmodel.evaluation.core import evaluate_core
from chatmodel.evaluation.decisions import KeptDecisions
from chatmodel.evaluation.samples import complete_sample_prompts, hold_sample_chats
from chatmodel.evaluation.scoring import find_hard_limit, get_device, get_rank
from chatmodel.evaluation.skills import evaluate_skills
from chatmodel.progress import ItemProgress
from chatmodel.runs import Run
from chatmodel.runtime import UserError, logger
from chatmodel.tokenizer import token_byte_lengths

T = TypeVar("T")
STAGES = ("base", "mid", "sft", "rl", "dpo")
# Tokens in a padded batch; and where every token has its logits, which a large vocabulary makes large.
BATCH_TOKENS = {"cuda": 32_768, "mps": 8192, "cpu": 4096}
LOGIT_TOKENS = 16_384


@dataclass
class EvalArguments:
    """What to evaluate, on what, and how much of it."""

    run_dir: Path | None = field(default=None, metadata={"help": "The run folder, e.g. runs/cpu."})
    stage: str = field(default="base", metadata={"help": "base (bpb, CORE, samples); mid, sft, rl, dpo (as a chat)."})
    model: str | None = field(default=None, metadata={"help": "Instead of a run: a model folder or Hub name."})
    output: Path | None = field(default=None, metadata={"help": "With --model: the JSON file to write."})
    trust_remote_code: bool = field(default=False, metadata={"help": "With --model: run the model's own code."})
    eval_bundle: str | None = field(
        default=None, metadata={"help": "CORE's data: a zip file, a folder or an address; #sha256=... is checked."}
    )
    chatcore: Path | None = field(default=None, metadata={"help": "ChatCORE's data, looked in before the Hub."})
    max_per_task: int | None = field(default=None, metadata={"help": "Examples per benchmark task; all if left out."})
    eval_tokens: int = field(default=20 * 524_288, metadata={"help": "Tokens per split for bits per byte."})
    document_tokens: int = field(default=2048, metadata={"help": "Length at which single documents are cut."})
    skills: list[str] | None = field(default=None, metadata={"help": "Generated tasks; by default those taught."})
    num_skill_examples: int = field(default=200, metadata={"help": "Examples per skill."})
    words: str = field(default="embedded", metadata={"help": "The word list of the training, for skills with words."})
    identity: Path | None = field(default=None, metadata={"help": "The YAML file of the training, for 'Identity'."})
    run_generated_code: bool = field(default=False, metadata={"help": "HumanEval: run programs the model wrote."})
    max_new_tokens: int = field(default=512, metadata={"help": "Length of generated replies."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of a CORE prompt that are kept, from its end; by default all."}
    )
    batch_tokens: int | None = field(
        default=None, metadata={"help": "Tokens in a padded batch; by device if not set."}
    )
    batch_size: int = field(default=32, metadata={"help": "Replies generated side by side."})
    mixed_precision: str | None = field(default=None, metadata={"help": "'bf16' or 'no'; by device if not set."})

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise UserError(f"stage={self.stage!r} is none of {', '.join(STAGES)}")
        if (self.run_dir is None) == (self.model is None):
            raise UserError("give either --run_dir (and --stage), or --model and --output")
        if self.model is not None and self.output is None:
            raise UserError("--model needs --output, the JSON file that the results are written to")
        if self.eval_bundle is not None and not (
            is_address(self.eval_bundle) or find_place(self.eval_bundle).exists()
        ):
            raise UserError(f"eval_bundle {self.eval_bundle} does not exist; leave it out, or {HOW_TO_GET_BUNDLE}")
        for name in ("max_per_task", "max_length", "batch_tokens", "eval_tokens", "document_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")


def find_decisions(args: EvalArguments, run: Run | None) -> Path:
    """Where decisions are kept until the result is written, beside it."""
    if run is not None:
        return run.folder("results") / f"{args.stage}_eval.decisions"
    assert args.output is not None
    return args.output.with_suffix(".decisions")


def evaluate_stage(
    args: EvalArguments, run: Run | None, model: Any, tokenizer: Any, *, kept: KeptDecisions | None = None
) -> dict[str, Any]:
    """The metrics of `args.stage` (see `runs`); without a run those that a model alone can give.

    Args:
        kept: decisions of an earlier start, which are not made again, and where new ones are kept.
    """
    kept = kept or KeptDecisions.nowhere()
    batch_tokens = args.batch_tokens or BATCH_TOKENS.get(get_device(model).type, BATCH_TOKENS["cpu"])
    if args.stage == "base":
        return evaluate_base(args, run, model, tokenizer, batch_tokens, kept)
    return evaluate_chat(args, run, model, tokenizer, batch_tokens, kept)


def evaluate_base(
    args: EvalArguments, run: Run | None, model: Any, tokenizer: Any, batch_tokens: int, kept: KeptDecisions
) -> dict[str, Any]:
    """CORE, bits per byte and the sample prompts; CORE first, which may be asked for in a way it has to refuse."""
    core = evaluate_core(
        model,
        tokenizer,
        args.eval_bundle,
        max_per_task=args.max_per_task,
        batch_tokens=batch_tokens,
        max_length=args.max_length or find_hard_limit(model),
        kept=kept,
    )
    bpb: dict[str, Any] = {
        "not_run": "a model alone has no token stores",
        "how": "give `--run_dir` and `--stage base`",
    }
    if run is not None:
        bpb = measure_bits_per_byte(args, run, model, tokenizer, batch_tokens)
    return {"bpb": bpb, "core": core, "samples": complete_sample_prompts(model, tokenizer)}


def measure_bits_per_byte(
    args: EvalArguments, run: Run, model: Any, tokenizer: Any, batch_tokens: int
) -> dict[str, Any]:
    """Bits per byte of packed rows of both splits, and of validation documents each alone."""
    rank, world_size = get_rank()
    token_bytes = token_byte_lengths(tokenizer)
    stores = {split: TokenStore.open(run.folder("data") / split) for split in ("train", "validation")}
    length = model.config.max_position_embeddings
    measured = {}
    for split, store in stores.items():
        rows = list(validation_rows(store, sequence_length=length, max_tokens=args.eval_tokens))[rank::world_size]
        size = max(1, min(batch_tokens, LOGIT_TOKENS) // length)
        batches = (default_collate(rows[begin : begin + size]) for begin in range(0, len(rows), size))
        with ItemProgress(f"bits per byte, {split}", unit="batch", total=-(-len(rows) // size)) as progress:
            measured[split] = bits_per_byte(model, count_items(batches, progress), token_bytes)
        logger.info("bits per byte, %s: %.4f", split, measured[split])
    store = stores["validation"]
    spans = [(start, end) for start, end in pairwise(store.offsets.tolist()) if start < args.eval_tokens]
    documents = (store.tokens[start:end].tolist() for start, end in spans)
    measured["validation_documents"] = document_bits_per_byte(
        model,
        documents,
        token_bytes,
        bos_token_id=tokenizer.bos_token_id,
        max_tokens=args.document_tokens,
        batch_tokens=min(batch_tokens, LOGIT_TOKENS),
    )
    logger.info("bits per byte, validation documents: %.4f", measured["validation_documents"])
    return measured


def count_items(items: Iterable[T], progress: "tqdm[Any]") -> Iterator[T]:
    """The same items; each one that is done with moves the bar."""
    for item in items:
        yield item
        progress.update()


def evaluate_chat(
    args: EvalArguments, run: Run | None, model: Any, tokenizer: Any, batch_tokens: int, kept: KeptDecisions
) -> dict[str, Any]:
    """ChatCORE, the taught skills and sample conversations."""
    render_chat_prompt(tokenizer, [{"role": "user", "content": "a tokenizer that cannot mark turns is refused here"}])
    limits = ChatLimits(args.max_per_task, batch_tokens, args.batch_size, args.max_new_tokens)
    chatcore = evaluate_chatcore(
        model, tokenizer, folder=args.chatcore, limits=limits, run_generated_code=args.run_generated_code, kept=kept
    )
    names = args.skills if args.skills is not None else find_taught_skills(run, args.stage)
    skills: dict[str, Any] = {"not_run": "the mixtures teach no generated task", "how": "name some with `--skills`"}
    if names:
        skills = evaluate_skills(
            model,
            tokenizer,
            names=names,
            num_examples=args.num_skill_examples,
            words=load_words(args.words) if set(names) & set(WORD_TASKS) else None,
            identity=load_identity(args.identity) if args.identity else None,
            limits=limits,
        )
    return {"chatcore": chatcore, "skills": skills, "samples": hold_sample_chats(model, tokenizer)}


def find_taught_skills(run: Run | None, stage: str) -> list[str]:
    """The generated tasks in the mixtures up to a stage; all of them where no mixture is known."""
    if run is None:
        return list(GENERATED_TASKS)
    results = [run.read_result(name) for name in STAGES[1 : STAGES.index(stage) + 1]]
    mixtures = [result["metrics"].get("mixture", []) for result in results if result]
    taught = {entry["name"] for mixture in mixtures for entry in mixture}
    return [name for name in GENERATED_TASKS if name in taught]
