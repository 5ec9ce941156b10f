"""The processes that `accelerate launch` or `torchrun` starts for one job."""

import os
from datetime import timedelta

PATIENCE = timedelta(days=7)
"""How long a process that is done waits for the slowest one."""

# torch is imported where it is needed: who asks for its share may have nothing else to do.


def process_share() -> tuple[int, int]:
    """The index of this process, and how many there are: 0 and 1 for one that was started alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def local_device_index() -> int | None:
    """Which accelerator of its machine this process takes; None for one that was started alone."""
    index = os.environ.get("LOCAL_RANK")
    return None if index is None else int(index)


def sum_over_processes(*numbers: int) -> list[int]:
    """The sum of every number over all processes, each of which has to call this once, at its end."""
    if process_share()[1] == 1:
        return list(numbers)
    import torch
    import torch.distributed

    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    totals = torch.tensor(numbers)
    torch.distributed.all_reduce(totals)
    torch.distributed.destroy_process_group()
    return totals.tolist()
