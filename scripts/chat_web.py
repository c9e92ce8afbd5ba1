"""Talk to a model folder on a web page: `python scripts/chat_web.py runs/cpu/sft`; several folders speak side by side.

Served for this machine only, unless --host says otherwise; whoever reaches the page may use the models.
"""

import argparse
from pathlib import Path

from chatmodel.chat.conversation import Sampling
from chatmodel.chat.page import Voice
from chatmodel.posttraining import load_stage_model
from chatmodel.runtime import UserError, choose_device, entry_point, logger


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("models", type=Path, nargs="+", help="model folders")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy")
    parser.add_argument("--top_k", type=int, default=50)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    try:
        from chatmodel.chat.layout import Layout, launch_page
    except ImportError as error:
        raise UserError(f"{error}; install the page's packages with: pip install -e '.[web]'") from None
    sampling = Sampling(top_k=args.top_k, max_new_tokens=args.max_new_tokens).with_temperature(args.temperature)
    names = [str(folder) for folder in args.models]
    if len(set(names)) < len(names):
        raise UserError("a model folder is named twice; name each once")
    device = choose_device()
    voices = []
    for name, folder in zip(names, args.models, strict=True):
        model, tokenizer = load_stage_model(folder)
        voices.append(Voice(name, model.to(device).eval(), tokenizer))
    logger.info("http://%s:%d (Ctrl-C ends it)", args.host, args.port)
    launch_page(Layout(voices, sampling), host=args.host, port=args.port)


if __name__ == "__main__":
    entry_point(main)
