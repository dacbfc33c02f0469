"""A PyTorch program as people write them for torchrun: it trains a small model with Gloo, and knows
nothing of who started it. Each rank prints lines that depend on nothing but the job."""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

# What torchrun documents for its workers, where the value is the same whoever starts them.
SAME = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS",
)  # fmt: skip
PRESENT = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


def main() -> None:
    """Trains for two epochs."""
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    lines = [f"{name}={os.environ.get(name)}" for name in SAME]
    lines += [f"{name} is there: {name in os.environ}" for name in PRESENT]
    data = TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
    sampler = DistributedSampler(data, shuffle=True, seed=1)
    model = DistributedDataParallel(torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for x, y in DataLoader(data, batch_size=4, sampler=sampler):
            loss = torch.nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        dist.all_reduce(loss.detach())
        lines.append(f"epoch {epoch}: loss {loss.item():.6f}")
    dist.barrier()
    # One write, so that lines of ranks do not mix where the starter does not keep them apart.
    sys.stdout.write("".join(f"rank {rank}: {line}\n" for line in lines))
    sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
