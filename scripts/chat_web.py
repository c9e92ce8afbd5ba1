"""Talk to a model folder on a web page: `python scripts/chat_web.py runs/cpu/sft`; several folders speak side by side.

Served for this machine only, unless --host says otherwise; whoever reaches the page may use the models.
"""

import argparse
from pathlib import Path


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("models", type=Path, nargs="+", help="model folders")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy")
    parser.add_argument("--top_k", type=int, default=50)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    args = parser.parse_args()
    for folder in args.models:
        if not folder.is_dir():
            parser.error(f"folder {folder} does not exist; give model folders, such as runs/cpu/sft")
    if len(set(args.models)) < len(args.models):
        parser.error("a model folder is named twice; name each once")
    if not 0 < args.port < 2**16:
        parser.error(f"--port {args.port} is no port; give a number from 1 to 65535")
    return args


def main() -> None:
    args = read_arguments()
    # Imported here, as they take seconds that --help or a wrong path should not.
    from chatmodel.chat.conversation import Sampling
    from chatmodel.chat.page import Voice
    from chatmodel.devices import choose_device
    from chatmodel.posttraining import load_stage_model
    from chatmodel.runtime import UserError

    try:
        from chatmodel.chat.layout import Layout, launch_page
    except ImportError as error:
        raise UserError(f"{error}; install the page's packages with: pip install -e '.[web]'") from None
    sampling = Sampling(top_k=args.top_k, max_new_tokens=args.max_new_tokens).with_temperature(args.temperature)
    device = choose_device()
    voices = []
    for folder in args.models:
        model, tokenizer = load_stage_model(folder)
        voices.append(Voice(str(folder), model.to(device).eval(), tokenizer))
    launch_page(Layout(voices, sampling), host=args.host, port=args.port)


if __name__ == "__main__":
    read_arguments()
    from chatmodel.runtime import entry_point

    entry_point(main)
