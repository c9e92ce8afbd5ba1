"""Make a model folder of nanochat's model: `python recipes/import_model.py --model model_000650.pt --output DIR`."""

from dataclasses import dataclass, field
from pathlib import Path

from chatmodel.arguments import parse_arguments
from chatmodel.export.imports import import_nanochat, import_transformers_nanochat
from chatmodel.export.parity import DEFAULT_TOLERANCE
from chatmodel.runtime import UserError, entry_point, logger


@dataclass
class ImportArguments:
    """What to import, and where to."""

    model: Path = field(
        metadata={
            "help": "nanochat's model_<step>.pt (meta_<step>.json beside it), or a folder of Transformers' NanoChat."
        }
    )
    output: Path = field(metadata={"help": "Folder to write."})
    tokenizer: Path | None = field(
        default=None, metadata={"help": "nanochat's tokenizer.pkl; by default where nanochat keeps it."}
    )
    nanochat_root: Path | None = field(
        default=None, metadata={"help": "A checkout of nanochat; its code is run to prove the logits equal."}
    )
    tolerance: float = field(
        default=DEFAULT_TOLERANCE,
        metadata={"help": "Largest difference of fp32 logits, as a share of their spread if above 1."},
    )


def main() -> None:
    (args,) = parse_arguments(ImportArguments)
    model, output = Path(args.model), Path(args.output)
    if not model.exists():
        raise UserError(f"--model {model} does not exist; give a model_<step>.pt or a model folder")
    if model.is_dir():
        if args.tokenizer or args.nanochat_root:
            raise UserError("--tokenizer and --nanochat_root are for nanochat's model_<step>.pt; leave them out")
        parity = import_transformers_nanochat(model, output, tolerance=args.tolerance)
    else:
        parity = import_nanochat(
            model,
            output,
            tokenizer_path=Path(args.tokenizer) if args.tokenizer else None,
            nanochat_root=Path(args.nanochat_root) if args.nanochat_root else None,
            tolerance=args.tolerance,
        )
    logger.info("%s: %s", output, parity.describe() if parity else "written; the logits were not compared")


if __name__ == "__main__":
    entry_point(main)
