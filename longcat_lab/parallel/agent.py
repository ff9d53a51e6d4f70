"""torchrun that ends with the process that started it, and its workers with it: `python -m longcat_lab.parallel.agent ARGUMENTS`."""

from __future__ import annotations

import os

from longcat_lab.parallel.faults import PARENT, end_with_parent


def main() -> None:
    """As `python -m torch.distributed.run`."""
    end_with_parent()
    os.environ[PARENT] = str(os.getpid())  # of the workers
    from torch.distributed.run import main as torchrun

    torchrun()


if __name__ == "__main__":
    main()
