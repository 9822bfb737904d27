"""A program that calls the library beside threads and processes of its own, which nobody may touch.

    python -m tests.guest SOURCE FOLDER [VALUES OF OPTIONS ...]

It has no ``if __name__ == "__main__":``. Tests run it, and the suite of minimum versions does on
other Pythons. It prints that it is done, once, and nothing else.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pp_to_vpp

source, folder = Path(sys.argv[1]), Path(sys.argv[2])


def state() -> list[Any]:
    """What a guest may not change for its host."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    blocked, start = (
        signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        multiprocessing.get_start_method(),
    )
    children = [process.pid for process in multiprocessing.active_children()]
    files, variables = os.listdir("/proc/self/fd"), dict(os.environ)
    hooks, collector = (threading.excepthook, sys.excepthook), (gc.get_threshold(), gc.isenabled())
    return [
        *(handlers, blocked, start, children, files, variables, hooks, collector),
        *(gc.get_freeze_count(), [*sys.path], [*sys.argv], os.getcwd(), threading.active_count()),
    ]


def convert(name: str) -> None:
    """One of three conversions at a time."""
    target = folder / name / source.name
    done = pp_to_vpp.convert(source, target, virtual_pipeline_model_parallel_size=2, processes=2)
    written.append(done.written)


def convert_in_pool(_: int) -> int:
    """In a daemonic process."""
    target = folder / "daemonic" / source.name
    return pp_to_vpp.convert(source, target, virtual_pipeline_model_parallel_size=2).written


context = multiprocessing.get_context("fork")
written: list[int] = []
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own forks
    executor = ProcessPoolExecutor(1, context)
    executors = executor.submit(os.getpid).result()
    bystander = context.Process(target=time.sleep, args=(600,))
    bystander.start()
    pool = context.Pool(1)
    pools = pool.apply(os.getpid)
before = state()

assert pp_to_vpp.inspect(source, processes=2).source.layout.vp_size == 1
pp_to_vpp.plan(source, virtual_pipeline_model_parallel_size=2, processes=2)
threads = [threading.Thread(target=convert, args=(name,)) for name in "abc"]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(set(written)) == 1, written
assert len(written) == 3, written
pp_to_vpp.verify(source, folder / "b" / source.name, depth="structure", processes=2)
assert state() == before, (state(), before)

assert pool.map(convert_in_pool, [0]) == written[:1]
assert pool.apply(os.getpid) == pools
assert executor.submit(os.getpid).result() == executors
assert bystander.is_alive()
bystander.kill()
bystander.join()
pool.terminate()
executor.shutdown()
print("done")  # noqa: T201
