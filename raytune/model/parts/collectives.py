"""Collectives that go on while a rank does something else."""

from torch.distributed import Work


def arrived(work: Work) -> None:
    """Wait for what all ranks send. By this function, whoever asks what a rank is at knows that it waits for others."""
    work.wait()
