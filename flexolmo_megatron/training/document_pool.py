"""Work in several processes, with the results in order; and pieces of files to work on.

``data`` cuts the files into chunks of records in one process, and others parse them and do the costly part. Where the
work is divided into shards (see ``flexolmo_megatron.shards``), every process reads for itself.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.training.documents import Bad, parse_record, read_records

CHUNK_BYTES = 1 << 20
"""Size of the piece of a file that one process works on at a time: large against the cost of handing it over."""
CHUNK_RECORDS = 4096
IN_FLIGHT = 4
"""Items per process that are handed out ahead, which bounds the memory."""

T = TypeVar("T")
Item = TypeVar("Item")
Records = Iterable[tuple[int, bytes | None]]


class Chunk(NamedTuple):
    """A piece of a file."""

    file: int
    """Which of the files."""
    path: Path
    records: list[tuple[int, bytes | None]]
    """Line or row, and bytes, as ``read_records`` gives them."""
    last: bool
    """Whether the file ends here; every file has such a chunk, if need be an empty one."""

    def parse(self, text_key: str) -> tuple[list[int], list[str], list[Bad]]:
        """Return lines and texts of the usable documents, and the others."""
        lines: list[int] = []
        texts: list[str] = []
        bad: list[Bad] = []
        for line, raw in self.records:
            text = parse_record(self.path, line, raw, text_key)
            if isinstance(text, Bad):
                bad.append(text)
            else:
                lines.append(line)
                texts.append(text)
        return lines, texts, bad


def read_chunks(files: Iterable[tuple[int, Path]], text_key: str,
                choose: Callable[[int, Records], Records] = lambda _, records: records) -> Iterator[Chunk]:
    """Cut files into chunks, which are the same whatever becomes of them.

    Args:
        files: number and path of each.
        text_key: for ``read_records``.
        choose: given a file's number and its records, returns those that are wanted.
    """
    for file, path in files:
        records: list[tuple[int, bytes | None]] = []
        size = 0
        for line, raw in choose(file, read_records(path, text_key)):
            records.append((line, raw))
            size += len(raw or b"")
            if size >= CHUNK_BYTES or len(records) >= CHUNK_RECORDS:
                yield Chunk(file, path, records, False)
                records, size = [], 0
        yield Chunk(file, path, records, True)


_work: Callable[[Any], Any]


def _start_worker(setup: Callable[[Any], Callable[[Any], Any]], argument: Any) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent sees to it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _work = setup(argument)
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:
        # Where the parent is killed nobody would tell this process to stop waiting for work.
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _call(item: Any) -> Any:
    return _work(item)


def work(items: Iterable[Item], setup: Callable[[T], Callable[[Item], Any]], argument: T, workers: int,
         process: str = "process") -> Iterator[Any]:
    """Yield what the function that ``setup(argument)`` returns makes of each item, in their order.

    Args:
        items: chunks of files, say.
        setup: a function of a module; called once in each process.
        argument: for ``setup``; is pickled.
        workers: processes; 1 is this process.
        process: what an error calls one of them.

    Raises:
        FlexOlmoError: a process was killed; and whatever the items and the function raise.
    """
    if workers == 1:
        function = setup(argument)
        for item in items:
            yield function(item)
        return
    # spawn: a fork of a process that has started threads, as torch does, may deadlock
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (setup, argument))
    pending: deque[Future[Any]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(_call, item))
            if len(pending) > workers * IN_FLIGHT:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise FlexOlmoError(f"a {process} was killed (out of memory?); --workers {workers} may be too many") from error
    finally:
        pool.shutdown(cancel_futures=True)
