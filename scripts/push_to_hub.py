"""Publish a stage of a run on the Hub: `python scripts/push_to_hub.py runs/cpu --stage sft --repo my-name/my-model`.

Uploads the model folder, the results it was measured with, and a model card that holds them. With `--output FOLDER`
instead of `--repo` all of it is written there, to be looked at or uploaded by hand.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from chatmodel.report.model_card import TRAINING_STAGES, write_model_card
from chatmodel.report.results import shorten_paths
from chatmodel.runs import Run
from chatmodel.runtime import UserError, entry_point


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, help="folder of the run, e.g. runs/cpu")
    parser.add_argument("--stage", default="sft", choices=TRAINING_STAGES[1:], help="which model")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--repo", help="name on the Hub: user/model")
    target.add_argument("--output", type=Path, help="a new folder, in place of the Hub")
    parser.add_argument("--private", action="store_true", help="only for whoever has access")
    return parser.parse_args()


def collect_files(run: Run, stage: str, folder: Path, *, name: str) -> None:
    """Copy what is published into `folder`: the model, its results, its card."""
    card = write_model_card(run, stage, name=name)
    if not (run.folder(stage) / "config.json").exists():
        raise UserError(f"{run.folder(stage)} holds no model any more; make it again with the stage's recipe")
    shutil.copytree(run.folder(stage), folder)
    (folder / "results").mkdir()
    for path in (run.result_path(stage), run.result_path(f"{stage}_eval")):
        text = shorten_paths(path.read_text(encoding="utf-8"))  # where things lie on this machine is nobody's business
        (folder / "results" / path.name).write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Upload `folder` as the newest version of `repo`, which is made if it is not there; returns its address.

    Raises:
        UserError: no permission, no connection, or a name that cannot be.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by chatmodel")
    except Exception as error:  # no permission, no network, offline mode: whichever the hub's client raises
        reason = " ".join(str(error).split())
        raise UserError(
            f"{repo} could not be published ({reason}); log in with `hf auth login`, or give --output to make the "
            "folder without the Hub"
        ) from None
    return str(address)


def main() -> None:
    args = read_arguments()
    run = Run(args.run_dir)
    if args.output is not None:
        if args.output.exists():
            raise UserError(f"--output {args.output} exists already; give the name of a new folder")
        collect_files(run, args.stage, args.output, name=args.output.name)
        sys.stdout.write(f"{args.output}\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        collect_files(run, args.stage, Path(folder) / args.stage, name=args.repo)
        sys.stdout.write(f"{upload(Path(folder) / args.stage, args.repo, private=args.private)}\n")


if __name__ == "__main__":
    entry_point(main)
