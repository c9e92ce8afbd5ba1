"""Write a model folder for other tools: `python recipes/export.py --to compat --model runs/x/sft --output out/x`."""

from dataclasses import dataclass, field
from pathlib import Path

from chatmodel.arguments import parse_arguments
from chatmodel.export.exports import export_model
from chatmodel.export.parity import DEFAULT_TOLERANCE
from chatmodel.runtime import entry_point, logger


@dataclass
class ExportArguments:
    """What to write, and where; docs/interop.md tells which model can become what."""

    to: str = field(
        metadata={
            "help": "'transformers-nanochat' (of --recipe seed); of --recipe compat, 'compat' (a Qwen3 folder for "
            "Transformers, vLLM, MLX) or 'gguf' (one file for llama.cpp)."
        }
    )
    model: Path = field(metadata={"help": "A model folder, e.g. runs/compat/sft."})
    output: Path = field(metadata={"help": "Folder to write; its parity.json holds what was compared."})
    tolerance: float = field(
        default=DEFAULT_TOLERANCE,
        metadata={"help": "Largest difference of fp32 logits, as a share of their spread if above 1."},
    )


def main() -> None:
    (args,) = parse_arguments(ExportArguments)
    output = Path(args.output)
    parity = export_model(Path(args.model), output, target=args.to, tolerance=args.tolerance)
    logger.info("%s: %s", output, parity.describe())


if __name__ == "__main__":
    entry_point(main)
