"""What does a task of lm_eval know about the model and the data? What `--model_args` and `--metadata` say.

lm_eval hands both to each task as its metadata, and no model.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from chatmodel.evaluation.bundle import BUNDLE_URL, find_bundle
from chatmodel.evaluation.core_tasks import CoreTask, load_core_tasks
from chatmodel.evaluation.scoring import find_hard_limit
from chatmodel.runtime import UserError

# Where data is looked for that no setting names: in the folder that lm_eval is started from.
DEFAULT_BUNDLES = ("eval_bundle.zip", "eval_bundle")
DEFAULT_CHATCORE = "chatcore"


@dataclass(frozen=True)
class TaskSettings:
    """Metadata of a task; hashable, so that tokenizers and bundles are opened once for all tasks.

    Of `--model_args`: pretrained, tokenizer, revision, trust_remote_code, max_length. Of `--metadata`: eval_bundle (a
    zip file, a folder or an address), chatcore (a folder, looked in before the Hub), max_per_task (examples per task,
    cut before few-shot examples are drawn), max_new_tokens (length of replies).
    """

    pretrained: str | None = None
    tokenizer: str | None = None
    revision: str = "main"
    trust_remote_code: bool = False
    max_length: int | None = None
    eval_bundle: str | None = None
    chatcore: str | None = None
    max_per_task: int | None = None
    max_new_tokens: int = 512

    @classmethod
    def read(cls, metadata: dict[str, Any]) -> "TaskSettings":
        """The settings among a task's metadata, which may hold any other argument of the model too."""
        return cls(**{name: metadata[name] for name in cls.__dataclass_fields__ if metadata.get(name) is not None})


@cache
def load_task_tokenizer(settings: TaskSettings) -> Any:
    """The tokenizer that lm_eval loads for the same `--model_args`."""
    name = settings.tokenizer or settings.pretrained
    if name is None:
        raise UserError(
            "these tasks need the model's tokenizer; name it with --model_args pretrained=... or --metadata "
            """'{"tokenizer": "..."}'"""
        )
    return AutoTokenizer.from_pretrained(
        name, revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )


@cache
def load_task_config(settings: TaskSettings) -> Any:
    """The model's config; an empty one where only a tokenizer is known."""
    if settings.pretrained is None:
        return SimpleNamespace()
    return AutoConfig.from_pretrained(
        settings.pretrained, revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )


def find_limit(settings: TaskSettings) -> int | None:
    """The length beyond which the model fails, as far as its config tells."""
    return find_hard_limit(SimpleNamespace(config=load_task_config(settings)))


def find_core_cut(settings: TaskSettings) -> int | None:
    """How many tokens of a CORE prompt are kept: `max_length`, or the table of learned positions, else all."""
    return settings.max_length or find_limit(settings)


def find_context(settings: TaskSettings) -> int | None:
    """How many tokens a conversation may have."""
    return settings.max_length or getattr(load_task_config(settings), "max_position_embeddings", None)


@cache
def load_bundle(eval_bundle: str | None, max_per_task: int | None) -> dict[str, CoreTask]:
    """The CORE tasks by label; from the official address, once, where no place is named and none found."""
    local = [place for place in DEFAULT_BUNDLES if Path(place).exists()]
    place = find_bundle(eval_bundle or next(iter(local), BUNDLE_URL))
    return {task.label: task for task in load_core_tasks(place, max_per_task=max_per_task)}


def find_chatcore_folder(settings: TaskSettings) -> Path | None:
    """The folder that ChatCORE's files are looked for in; None for the Hub alone."""
    if settings.chatcore is not None:
        return Path(settings.chatcore)
    return Path(DEFAULT_CHATCORE) if Path(DEFAULT_CHATCORE).is_dir() else None
