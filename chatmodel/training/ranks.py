"""How do the ranks of a run agree, and what do those say that are left when one is gone?"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, parse_flag_from_env

from chatmodel.runtime import UserError, logger

PREPARATION_TIMEOUT = timedelta(days=2)  # to make a token store of any size
LOST_RANK_WORDS = ("connection closed", "connection reset", "timed out", "gloo", "nccl", "broken pipe", "socket")


def join_ranks(*, timeout: float) -> None:
    """Connect the ranks that torchrun started, also those that it started again; before Accelerate would do it.

    torchrun keeps one store for all attempts, where ranks that were started again find the addresses of the dead
    (https://github.com/pytorch/pytorch/issues/135712, seen with torch 2.13). Each attempt gets a part of its own here.
    """
    if dist.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return
    rank, world_size, limit = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(seconds=timeout)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=limit)  # type: ignore[attr-defined]
    attempt = store.add(f"chatmodel/starts of rank {rank}", 1)  # all ranks start equally often
    own = dist.PrefixStore(f"chatmodel/attempt {attempt}", store)  # type: ignore[attr-defined]
    on_cuda = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    backend = "cuda:nccl,cpu:gloo" if on_cuda else "gloo"
    dist.init_process_group(backend, store=own, rank=rank, world_size=world_size, timeout=limit)


def check_launch(accelerator: Accelerator) -> None:
    """Say that FSDP was asked for and Accelerate does not give it, as on CPUs and to a single process.

    Raises:
        UserError: processes were started together that do not know of each other, and would all write to one run.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and accelerator.num_processes == 1:
        raise UserError(
            f"{started} processes were started, and Accelerate lets each train alone, as it finds no GPU; start one, "
            "or set ACCELERATE_USE_CPU=true in the environment for training on several CPU ranks"
        )
    ignored = parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.distributed_type != DistributedType.FSDP
    if ignored and accelerator.is_main_process:
        logger.warning(
            "FSDP is asked for and not used, as Accelerate has it for several GPUs only: every process (there are %d) "
            "holds the whole model; start one process per GPU, or leave FSDP out of the Accelerate config",
            accelerator.num_processes,
        )


class Ranks:
    """What all ranks of a run do together beside exchanging gradients; every method is called by all of them.

    Args:
        timeout: most seconds that one waits for another.
    """

    def __init__(self, accelerator: Accelerator, *, timeout: float) -> None:
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.device = accelerator.device
        # Small decisions go over the CPUs: they would make a GPU wait.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if self.count > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether any rank raised it."""
        if self.count == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in raised]

    def minimum(self, value: int) -> int:
        """The least of the ranks' values."""
        if self.count == 1:
            return value
        least = torch.tensor(value)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._group)
        return int(least)

    def gather(self, value: Any) -> list[Any]:
        """The ranks' values in their order, on every rank."""
        return list(gather_object([value])) if self.count > 1 else [value]

    def take_from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        values = [value]
        return broadcast_object_list(values)[0] if self.count > 1 else value

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let rank 0 do the work of this block first; the others wait for it as long as it takes."""
        patient = dist.new_group(backend="gloo", timeout=PREPARATION_TIMEOUT) if self.count > 1 else None
        if patient is not None and not self.is_main:
            dist.barrier(patient)
        yield
        if patient is not None:
            if self.is_main:
                dist.barrier(patient)
            dist.destroy_process_group(patient)

    def end_together(self, sentence: str) -> NoReturn:
        """End every rank with exit code 2; only rank 0 says why."""
        if self.is_main:
            raise UserError(sentence)
        sys.exit(2)

    @contextmanager
    def explain_lost_rank(self, checkpoints: Path) -> Iterator[None]:
        """Turn what a collective operation says when another rank is gone into a sentence."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not is_lost_rank(error):
                raise
            raise UserError(
                f"rank {self.rank} waited in vain for another rank, which says why if it could "
                f"({str(error).splitlines()[0][:200]}); start again to continue from the last checkpoint in "
                f"{checkpoints}, or let torchrun do it with --max_restarts"
            ) from None


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether an error comes from a collective operation that another rank did not take part in."""
    if isinstance(error, dist.DistError):
        return True
    return any(word in str(error).lower() for word in LOST_RANK_WORDS)
