"""Which folder was meant: sentences for one without a model, with those that have one."""

from pathlib import Path

from chatmodel.runtime import UserError

MODEL_STAGES = ("base", "mid", "sft", "rl", "dpo")


def check_model_name(name: str) -> bool:
    """Whether `name` is a folder; else it is a name on the Hub, which has two parts at most.

    Raises:
        UserError: it is a folder without a model, or the path of one that does not exist.
    """
    folder = Path(name)
    if not (folder / "config.json").is_file() and (folder.is_dir() or len(folder.parts) > 2):
        raise UserError(explain_no_model(folder))
    return folder.is_dir()


def explain_no_model(folder: Path) -> str:
    """One sentence for a folder without a model: whether it is there at all, and where models of its run lie."""
    if not folder.is_dir():
        beside = find_models(folder.parent)
        mend = f"its run has {', '.join(beside)}" if beside else "give a model folder, such as runs/cpu/sft"
        return f"folder {folder} does not exist; {mend}"
    inside = find_models(folder)
    if inside:
        return f"{folder} is a run folder; give one of its stages: {', '.join(inside)}"
    return f"{folder} holds no model (no tokenizer.json or config.json); give a folder that a stage has finished"


def find_models(run_dir: Path) -> list[str]:
    """The model folders of a run."""
    return [str(run_dir / stage) for stage in MODEL_STAGES if (run_dir / stage / "config.json").is_file()]
