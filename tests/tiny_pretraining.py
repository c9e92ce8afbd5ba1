"""A pretraining run of a second, and processes that start at once: forked, so that nothing is imported again."""

import logging
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs

from chatmodel.data.rows import PackedRows
from chatmodel.runs import Run
from chatmodel.runtime import UserError, logger
from chatmodel.tokenizer import save_tokenizer
from chatmodel.training.arguments import PretrainArguments, open_stores
from chatmodel.training.loop import Pretraining

SETTINGS = {
    "depth": 1,
    "head_dim": 32,
    "sequence_length": 32,
    "total_batch_tokens": 64,
    "device_batch_size": 1,
    "max_steps": 8,
    "eval_every": 4,
    "eval_tokens": 64,
    "save_every": 3,
    "log_every": 1,
    "mixed_precision": "no",
    "compile": False,
}


def write_text(folder: Path) -> Path:
    """Two shards of documents of very different lengths, each with a character that few others have."""
    folder.mkdir()
    chance = random.Random(0)
    for shard in range(2):
        words = ([str(chance.randrange(500)) for _ in range(chance.randrange(1, 60))] for _ in range(200))
        texts = [" and ".join([chr(0x4E00 + number % 64), *some]) for number, some in enumerate(words)]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{shard}.parquet")
    return folder


def make_run(run_dir: Path, tokenizer, text: Path) -> Run:
    """A run folder with a tokenizer and token stores."""
    run = Run(run_dir)
    save_tokenizer(tokenizer, run.folder("tokenizer"))
    args = arguments(run, text)
    open_stores(args, args.plan(len(tokenizer)), tokenizer, run)
    return run


def copy_run(run: Run, run_dir: Path) -> Run:
    """Another run that begins as the first did."""
    for name in ("tokenizer", "data"):
        shutil.copytree(run.folder(name), run_dir / name)
    return Run(run_dir)


def arguments(run: Run, text: Path, **changes) -> PretrainArguments:
    """Those of the tiny run."""
    return PretrainArguments(run_dir=run.run_dir, dataset=str(text), **(SETTINGS | changes))


def build(run: Run, text: Path, *, cpu: bool = True, **changes) -> Pretraining:
    """Pretraining in this process, single or a rank."""
    args = arguments(run, text, **changes)
    handlers = [InitProcessGroupKwargs(timeout=timedelta(seconds=args.rank_timeout))]
    return Pretraining(args, run, Accelerator(cpu=cpu, mixed_precision=args.mixed_precision, kwargs_handlers=handlers))


def find_late_word(rows: PackedRows, count: int, *, of_rank: int | None = None) -> tuple[int, int]:
    """(row, token): the last of `count` rows with a token that no row before has, and this token.

    Args:
        of_rank: only among the rows of this one of two ranks.
    """
    seen: set[int] = set()
    latest = None
    for number, row in enumerate(islice(rows, count)):
        tokens = set(row["input_ids"].tolist())
        if tokens - seen and of_rank in (None, number % 2):
            latest = (number, min(tokens - seen))
        seen |= tokens
    assert latest is not None
    return latest


def train_and_save(run: Run, text: Path, **changes) -> None:
    """Train to the end and leave weights and losses in the run folder; what a child does."""
    pretraining = build(run, text, **changes)
    pretraining.train()
    if pretraining.ranks.is_main:
        torch.save(pretraining.model.state_dict(), run.run_dir / "weights.pt")
        torch.save(pretraining.state.history, run.run_dir / "history.pt")


def fork(function: Callable[..., None], *args, environment: dict[str, str] | None = None, log: Path, **kwargs) -> int:
    """Start `function` in a forked process, what it says going to `log`; returns the process's id."""
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        logger.setLevel(logging.INFO)
        logger.handlers, logger.propagate = [logging.StreamHandler()], False
        os.environ.update(environment or {})
        torch.set_num_threads(1)  # OpenMP's threads did not survive the fork
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        function(*args, **kwargs)
        code = 0
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        code = 2
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(*children: int, timeout: float = 60.0) -> list[int]:
    """The exit codes of forked processes; a signal's number with a minus where one was killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children]


def fork_ranks(count: int, function: Callable[..., None], *args, log: Path, **kwargs) -> list[int]:
    """Fork as many ranks as torchrun would start."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}
    return [
        fork(
            function,
            *args,
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            log=log.with_suffix(f".{rank}"),
            **kwargs,
        )
        for rank in range(count)
    ]
