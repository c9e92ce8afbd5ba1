"""Serve a model folder with the OpenAI protocol: `python scripts/serve.py runs/cpu/sft --device cpu --port 8000`.

This is `transformers serve` (all its options work) with this project's model made known to it, and with limits on what
is asked of it.
"""

import argparse
import sys
from pathlib import Path

from chatmodel.chat.gate import read_api_keys
from chatmodel.chat.limits import Limits
from chatmodel.chat.server import mend_server
from chatmodel.runtime import UserError, entry_point, logger

LOCAL = ("localhost", "127.0.0.1", "::1")


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and those of `transformers serve`."""
    default = Limits()
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="all options of transformers serve work too", allow_abbrev=False
    )
    parser.add_argument("--api-key-file", type=Path, help="a file of keys, one a line; without it anyone may ask")
    parser.add_argument("--max-messages", type=int, default=default.max_messages, help="of a conversation")
    parser.add_argument("--max-message-chars", type=int, default=default.max_message_chars)
    parser.add_argument("--max-chars", type=int, default=default.max_chars, help="of all text in a request")
    parser.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens, help="of an answer")
    parser.add_argument("--max-temperature", type=float, default=default.max_temperature)
    parser.add_argument("--max-parallel", type=int, default=default.max_parallel, help="requests at once")
    parser.add_argument("--max-body-bytes", type=int, default=default.max_body_bytes)
    parser.add_argument("--host", default="localhost", help="passed on to transformers serve")
    return parser.parse_known_args()


def main() -> None:
    args, passed_on = read_arguments()
    api_keys = [] if args.api_key_file is None else read_api_keys(args.api_key_file)
    if not api_keys and args.host not in LOCAL:
        logger.warning("--host %s without --api-key-file: whoever reaches this port may use the model", args.host)
    given = {name: value for name, value in vars(args).items() if name.startswith("max_")}
    for name, value in given.items():
        if value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value} must be more than 0")
    limits = Limits(**given)
    try:
        from transformers.cli.transformers import main as run_transformers

        mend_server(limits, api_keys)
    except ImportError as error:
        raise UserError(f"{error}; install the server's packages with: pip install -e '.[serve]'") from None
    sys.argv[1:] = ["serve", *passed_on, "--host", args.host]
    run_transformers()


if __name__ == "__main__":
    entry_point(main)
