"""Build the token store of a run ahead of time: `python scripts/prepare_data.py --config CONFIG/pretrain.yaml`.

It takes pretraining's own arguments but `--dry_run`, and needs the run's tokenizer; pretraining then starts at once.
"""

from chatmodel.arguments import parse_arguments
from chatmodel.data.store import TokenStore
from chatmodel.runs import Run
from chatmodel.runtime import UserError, entry_point, logger
from chatmodel.tokenizer import load_tokenizer
from chatmodel.training.arguments import PredictionArguments, PretrainArguments, open_stores


def main() -> None:
    args, asked = parse_arguments(PretrainArguments, PredictionArguments)
    if args.dry_run:
        raise UserError("this script writes the token store; leave dry_run out, or give it to recipes/pretrain.py")
    asked.check(dry_run=False)
    run = Run(args.run_dir)
    tokenizer = load_tokenizer(run.folder("tokenizer"))
    stores = open_stores(args, args.plan(len(tokenizer)), tokenizer, run)
    for store in stores:
        TokenStore.open(store.folder, check_hash=True)
        logger.info(
            "%s: %s tokens of %s documents, %s bytes a token, checked",
            store.folder,
            f"{store.num_tokens:,}",
            f"{store.num_documents:,}",
            f"{store.manifest['bytes'] / store.num_tokens:.2f}",
        )


if __name__ == "__main__":
    entry_point(main)
