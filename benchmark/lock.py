"""What a lock around the shared parameters would cost A3C: the share of a worker's time that it spends inside.

    python benchmark/lock.py --num-workers 2 --total-timesteps 60000
    python benchmark/lock.py --num-workers 2 --total-timesteps 60000 --num-steps 5      # the paper's t_max

Takes the flags of a3c.py but --lock, and needs fork. The inverse of the share bounds the workers that can pay.
"""

import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import a3c  # noqa: E402


class TimedLock:
    """A lock that counts the seconds inside it, and those since it was first taken, for each process."""

    lock, inside, total = multiprocessing.Lock(), multiprocessing.Value("d"), multiprocessing.Value("d")

    def __enter__(self):
        self.lock.acquire()
        self.entered = time.perf_counter()
        self.last = getattr(self, "last", self.entered)

    def __exit__(self, *exception):
        now = time.perf_counter()
        self.inside.value += now - self.entered  # safe: the lock is held
        self.total.value += now - self.last
        self.last = now
        self.lock.release()


if __name__ == "__main__":
    args = tyro.cli(a3c.Args)
    with tempfile.TemporaryDirectory() as args.run_dir:
        a3c.nullcontext = TimedLock
        a3c.train(args)
    print(f"{TimedLock.inside.value / TimedLock.total.value:.1%} of a worker's time is under the lock")
