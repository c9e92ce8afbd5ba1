"""What a run folder holds, which of its stages are finished, and whether they still fit together."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from chatmodel.arguments import requested_settings
from chatmodel.environment import describe_environment
from chatmodel.runtime import UserError, logger, read_json, warn_once, write_json

# Each stage, in order, with the stage whose artefacts it reads.
STAGE_INPUTS: dict[str, tuple[str, ...]] = {
    "tokenizer": (),
    "base": ("tokenizer",),
    "base_eval": ("base",),
    "mid": ("base",),
    "mid_eval": ("mid",),
    "sft": ("mid",),
    "sft_eval": ("sft",),
    "rl": ("sft",),
    "rl_eval": ("rl",),
}
# Beside the pipeline: a stage that is begun by hand.
OPTIONAL_INPUTS: dict[str, tuple[str, ...]] = {"dpo": ("sft",), "dpo_eval": ("dpo",)}

# Where the run lies, how it is watched and kept, when it is measured on the way, and how many rows a device holds at
# once (the rows of a step are the same) change no model, so changing them is no changed setting: a run that was
# stopped can go on with them.
NEUTRAL_SETTINGS = frozenset(
    {
        *("run_dir", "tracker", "report_to", "logging_steps", "log_every", "overwrite"),
        *(
            "save_every",
            "save_every_minutes",
            "data_timeout",
            "rank_timeout",
            "device_batch_size",
            "auto_batch",
            "cuda_graphs",
            "hourly_rate",
            "eval_every",
            "core_every",
            "sample_every",
            "preview_masks",
            "accept_changes",
        ),
    }
)
# What is measured at a stage's end depends on these: they count once it is finished.
MEASURED_AT_END = {"base": frozenset({"eval_bundle", "core_max_per_task"})}
WORDS = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}


@dataclass(frozen=True)
class Run:
    """A run: `tokenizer/ base/ mid/ sft/ rl/` (complete model folders), `data/`, `results/*.json`, `report.*`."""

    run_dir: Path

    def __post_init__(self) -> None:
        if Path(self.run_dir).is_file():
            raise UserError(f"run_dir {self.run_dir} is a file; give the path of a folder, which need not exist")

    def check_writable(self) -> None:
        """Make the folder where there is none, and refuse one that results cannot be written to.

        Raises:
            UserError: it is not writable, or cannot be made.
        """
        results = self.folder("results")
        try:
            results.mkdir(parents=True, exist_ok=True)
            for folder in (self.run_dir, results):
                with tempfile.TemporaryFile(dir=folder):
                    pass
        except OSError as error:
            raise UserError(
                f"run_dir {self.run_dir} cannot be written to ({error.strerror}: {error.filename or results}); "
                "choose another --run_dir, or make this one writable"
            ) from None

    def folder(self, name: str) -> Path:
        """Where a stage's artefacts lie, e.g. `folder("sft")`."""
        return Path(self.run_dir) / name

    def checkpoints(self, stage: str) -> Path:
        """Where an unfinished stage keeps the state it continues from."""
        return self.folder("checkpoints") / stage

    def result_path(self, stage: str) -> Path:
        """The JSON file that says a stage is finished."""
        return self.folder("results") / f"{stage}.json"

    def read_result(self, stage: str) -> dict[str, Any] | None:
        """The result of a finished stage, or None."""
        path = self.result_path(stage)
        return read_json(path) if path.exists() else None

    def begin(
        self,
        stage: str,
        *,
        inputs: Sequence[str] | None = None,
        settings: dict[str, Any] | None = None,
        defaults: dict[str, Any] | None = None,
        accept_changes: bool | None = None,
    ) -> "Stage | None":
        """Open a stage for work; None when it is already finished with these settings.

        Args:
            inputs: stages whose artefacts this one reads, by default those of `STAGE_INPUTS`; they must be finished.
            settings: what was asked for; by default read from the command line and its `--config` file.
            defaults: what is meant where nothing is asked for; kept with the result.
            accept_changes: whether a stage that was begun goes on with other settings; None where that is no option.

        Raises:
            UserError: an input is not finished, the stage was made or begun with other settings or inputs, another
                process is at work on it, or the folder cannot be written to.
        """
        opened = self._open(stage, inputs, requested_settings(sys.argv[1:]) if settings is None else settings)
        opened.defaults = leave_out_neutral(defaults or {})
        if self._is_finished(opened):
            logger.info("%s: already finished in %s, nothing to do", stage, self.run_dir)
            return None
        self.check_writable()
        if int(os.environ.get("RANK", "0")) == 0:  # the other ranks do nothing without it
            opened.lock()
        if opened.marker.exists() and any(self.checkpoints(stage).glob("*")):
            begun = read_json(opened.marker)
            if accept_changes:
                begun["settings"] = opened.settings
            instead = "" if accept_changes is None else ", or add --accept_changes to go on with the change"
            self._refuse_change(
                opened, begun, "was begun", instead=instead, ignore=MEASURED_AT_END.get(stage, frozenset())
            )
            if accept_changes:
                write_json(opened.marker, begun)
        else:
            # Without a checkpoint nothing is lost, so a corrected command simply begins anew.
            write_json(opened.marker, {"settings": opened.settings, "inputs": opened.inputs, "started": _now()})
        opened.started = read_json(opened.marker)["started"]
        return opened

    def is_finished(self, stage: str, *, settings: dict[str, Any]) -> bool:
        """Whether a stage is finished with these settings; raises as `begin` does."""
        return self.result_path(stage).exists() and self._is_finished(self._open(stage, None, settings))

    def _open(self, stage: str, inputs: Sequence[str] | None, settings: dict[str, Any]) -> "Stage":
        asked = leave_out_neutral(settings)
        needed = (STAGE_INPUTS | OPTIONAL_INPUTS)[stage] if inputs is None else inputs
        return Stage(self, stage, asked, {name: self._finished_id(name, needed_by=stage) for name in needed})

    def _is_finished(self, stage: "Stage") -> bool:
        if not self.result_path(stage.name).exists():
            return False
        self._refuse_change(stage, read_json(self.result_path(stage.name)), "was made")
        return True

    def _finished_id(self, stage: str, *, needed_by: str) -> str:
        result = self.read_result(stage)
        if result is None:
            raise UserError(
                f"stage {needed_by} needs stage {stage}, which is not finished in {self.run_dir}; "
                "run its recipe first, or scripts/speedrun.py for all of them"
            )
        return str(result["id"])

    def _refuse_change(
        self,
        stage: "Stage",
        earlier: dict[str, Any],
        happened: str,
        *,
        instead: str = "",
        ignore: frozenset[str] = frozenset(),
    ) -> None:
        results = self.folder("results") / stage.name
        places = f"{results}.*, {stage.folder} and {self.checkpoints(stage.name)}"
        mend = f"choose another --run_dir, or delete {places} to do it again"
        made_with = leave_out_neutral(earlier["settings"])  # an older version may have counted more
        changed = find_changed(made_with, stage.settings, stage.defaults or earlier.get("defaults", {})) - ignore
        if changed:
            changes = [
                f"{key}={made_with.get(key, 'unset')}, now {stage.settings.get(key, 'unset')}"
                for key in sorted(changed)
            ]
            raise UserError(
                f"stage {stage.name} in {self.run_dir} {happened} with {'; '.join(changes)}: {mend}{instead}"
            )
        if earlier["inputs"] != stage.inputs:
            others = [key for key, value in stage.inputs.items() if earlier["inputs"].get(key) != value]
            raise UserError(
                f"stage {stage.name} in {self.run_dir} {happened} from another {', '.join(others)}: {mend}"
            )


@dataclass
class Stage:
    """A stage at work: its name, what was asked for, and the ids of what it builds on."""

    run: Run
    name: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    started: str = field(default_factory=lambda: _now())
    defaults: dict[str, Any] = field(default_factory=dict)
    locked: int | None = None  # the descriptor of the file that says who is at work

    @property
    def folder(self) -> Path:
        """Where the stage puts its artefacts."""
        return self.run.folder(self.name)

    @property
    def marker(self) -> Path:
        """The file that says the stage was begun, and with which settings."""
        return self.run.folder("results") / f"{self.name}.begun"

    def lock(self) -> None:
        """Keep other processes from this stage until this one finishes it or ends, however it ends.

        By `lockf`: unlike those of `flock`, its locks are not inherited by worker processes, which may end later, and
        hold between machines. This process must not open and close the file a second time: that would free it.

        Raises:
            UserError: another process has the stage.
        """
        path = self.run.folder("results") / f".{self.name}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace")
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"stage {self.name} in {self.run.run_dir} is at work already, in {holder or 'another process'}; "
                    "wait for it or stop it first, or choose another --run_dir"
                ) from None
            text = "the file system of %s has no locks (%s): see to it yourself that no stage runs twice there"
            warn_once(text, str(self.run.run_dir), str(error.strerror))
            return
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self.locked = descriptor

    @property
    def id(self) -> str:
        """A short hash of the settings, of everything upstream and of this making: a stage done anew gets a new id."""
        content = json.dumps([self.name, self.settings, self.inputs, self.started], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write `results/<stage>.json`; `seconds` counts from the first beginning, interruptions included."""
        finished = _now()
        seconds = (datetime.fromisoformat(finished) - datetime.fromisoformat(self.started)).total_seconds()
        write_json(
            self.run.result_path(self.name),
            {
                "stage": self.name,
                "id": self.id,
                "command": " ".join(["python", *sys.argv]),
                "settings": self.settings,
                "defaults": self.defaults,
                "inputs": self.inputs,
                "started": self.started,
                "finished": finished,
                "seconds": seconds,
                "environment": describe_environment(),
                "metrics": metrics,
            },
        )
        self.marker.unlink(missing_ok=True)
        if self.locked is not None:
            os.close(self.locked)
            self.locked = None
        logger.info("%s: finished in %.0f s, see %s", self.name, seconds, self.run.result_path(self.name))


def leave_out_neutral(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a result depends on."""
    return {key: value for key, value in settings.items() if key not in NEUTRAL_SETTINGS}


def find_changed(before: dict[str, Any], now: dict[str, Any], defaults: dict[str, Any]) -> set[str]:
    """The settings that say something else, not only in another spelling."""
    both = (defaults | before, defaults | now)
    return {key for key in both[0].keys() | both[1].keys() if _meaning(both[0].get(key)) != _meaning(both[1].get(key))}


def _meaning(value: Any) -> Any:
    """What a setting says, however it is written: `no` is false, and 1e8 is 100000000."""
    if not isinstance(value, str):
        return value
    try:
        return WORDS.get(value.lower(), float(value))
    except ValueError:
        return WORDS.get(value.lower(), value)


def publish_folder(made: Path, target: Path) -> None:
    """Put a finished folder in its place; the one that was there is only removed once the new one is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        made.rename(target)
        shutil.rmtree(old)
    else:
        made.rename(target)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")
