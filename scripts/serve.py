"""Serve a model folder with the OpenAI protocol: `python scripts/serve.py runs/cpu/sft --device cpu --port 8000`.

This is `transformers serve` (all its options work) with this project's model made known to it.
"""

import sys

import chatmodel


def main() -> None:
    try:
        from transformers.cli.transformers import main as run_transformers
    except ImportError as error:
        sys.exit(f"error: {error}; install the server's packages with: pip install -e '.[serve]'")
    # The server of 5.23 looks every architecture up in this namespace, so no model with code of its own would start.
    # It is the module of this moment that counts: the command-line interface has put a new one in the old one's place.
    sys.modules["transformers"].GPTForCausalLM = chatmodel.GPTForCausalLM  # type: ignore[attr-defined]
    sys.argv.insert(1, "serve")
    run_transformers()


if __name__ == "__main__":
    main()
