"""The stream of batches that training reads: which items, by which processes, and what is done about bad ones."""

import atexit
import signal
import sys
import time
from contextlib import contextmanager
from multiprocessing import active_children
from threading import Timer, current_thread, main_thread

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler, default_collate

from EqM.data.autoencoder import draw, to_pixels
from EqM.run import seeds, stops
from EqM.run.distributed import SharedSet
from EqM.run.errors import UserError, printable, reason


def micro_batch_size(args, ranks):
    """Samples of one forward pass on one rank."""
    size, left = divmod(args.global_batch_size, ranks.world_size * args.grad_accum_steps)
    if left:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} does not divide into {ranks.world_size} rank(s) "
            f"x {args.grad_accum_steps} accumulation step(s)"
        )
    return size


def batches(args, dataset, autoencoder, ranks, first_step, tell):
    """Endless micro-batches of this rank from a step on: latents FP32 (N, C, [T,] h, w) and labels (N,).

    What is random about them comes from torch's generators at the moment a batch is asked for. tell: for bad files.
    """
    keys = Stream(
        len(dataset), micro_batch_size(args, ranks), ranks.rank, ranks.world_size, args.global_seed,
        first_batch=first_step * args.grad_accum_steps,
    )  # fmt: skip
    bad_files = BadFiles(dataset, args.max_bad_fraction, tell)

    def encoded():
        for items, labels, bad in read(dataset, keys, args.num_workers, ranks.device.type == "cuda"):
            bad_files.note(bad)
            items, labels = (part.to(ranks.device, non_blocking=True) for part in (items, labels))
            yield draw(items) if args.latents else autoencoder.encode(to_pixels(items)), labels

    return Batches(encoded(), bad_files)


class Batches:
    """An iterator over batches, and the BadFiles met on the way."""

    def __init__(self, stream, bad_files):
        self._stream = stream
        self.bad_files = bad_files

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._stream)

    def close(self):
        """End the processes that read."""
        self._stream.close()


class BadFiles:
    """Tells each file that does not decode once, on the main rank, and stops the run when there are too many.

    They are counted over all ranks, which do not wait for each other: the rank that finds one too many stops.
    limit: largest tolerated share of the data set.
    """

    def __init__(self, dataset, limit, tell):
        self.dataset = dataset
        self.limit = limit
        self.tell = tell
        self.seen = set()
        self.told = 0
        self._shared = SharedSet()
        self._is_main = not dist.is_initialized() or dist.get_rank() == 0

    def note(self, indices):
        """indices: of one batch, -1 where the file was good. Raises UserError past the limit."""
        new = set(indices.tolist()) - self.seen - {-1}
        self.seen |= new
        for index in sorted(new):
            self._shared.add(index)
        if not new:
            return
        self.agree()
        if len(self._shared) > max(1, self.limit * len(self.dataset)):
            paths = sorted(printable(self.dataset.path(index)) for index in self._shared.since(0))
            raise UserError(
                f"{len(paths)} of {len(self.dataset)} files do not decode, more than --max-bad-fraction "
                f"{self.limit:g}: {', '.join(paths[:10])}{', ...' if len(paths) > 10 else ''}"
            )

    def agree(self):
        """Tell what any rank has found so far and nobody has told: for log lines, and once more when all have ended."""
        if not self._is_main:
            return
        new = self._shared.since(self.told)
        self.told += len(new)
        for index in new:
            path, fault = printable(self.dataset.path(index)), self.dataset.fault(index)
            self.tell(f"{path} {fault}; another file of its class stands in")


class Stream(Sampler):
    """Endless batches of (epoch, index) keys, epoch after epoch without a seam, from any batch on.

    Batch b of all ranks together is the same whatever their number: ranks take consecutive parts of it.
    """

    def __init__(self, length, batch_size, rank, world_size, seed, first_batch=0):
        self.length = length
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.batch = first_batch

    def __iter__(self):
        epoch, order = -1, None
        while True:
            first = (self.batch * self.world_size + self.rank) * self.batch_size
            keys = []
            for position in range(first, first + self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = torch.randperm(self.length, generator=seeds.generator(self.seed, epoch)).numpy()
                keys.append((epoch, int(order[position % self.length])))
            self.batch += 1
            yield keys


def read(dataset, stream, num_workers, pin_memory):
    """Batches of (pixels uint8 (N, ...), labels (N,), bad file indices (N,)), without end.

    Closing the generator ends its workers; so does the end of the process. Raises UserError with the cause, at the
    next batch, if a worker dies, or a class has no file that decodes.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=stream,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_collated,
        worker_init_fn=_leave_signals_to_parent,
        generator=torch.Generator(),  # else it draws its workers' seeds from the step's own numbers
    )
    workers, batches = _Workers(), None
    try:
        with workers.started():
            batches = iter(loader)
        for batch in batches:
            yield batch
            workers.check()
    except ValueError as error:
        told = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        if not told.startswith("no file of class"):  # a dataset's own word, in a worker or here; else a bug
            raise
        raise UserError(told) from None
    except (RuntimeError, ConnectionError, EOFError) as error:  # the latter two: it died with a batch half sent
        told = isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)
        if not told and not workers.have_died():  # "Caught RuntimeError in DataLoader worker", say: a bug
            raise
        died = workers.died or error  # the first to be told knows more: which signal it was
        raise UserError(f"a data worker died ({reason(died)}); if memory ran out, use fewer --num-workers") from None
    finally:
        workers.end(batches)


def _collated(items):
    """A batch: what a dataset with `__getitems__` has put together itself, or else its items."""
    return items if isinstance(items, tuple) else default_collate(items)


class _Workers:
    """The processes of one stream: they leave signals to their parent, and end with it.

    died: what PyTorch said of the first that died; None while all live.
    """

    LAST_WORDS = 2.0  # seconds in which they end by themselves; nothing they do is worth waiting for

    def __init__(self):
        self.died = None
        self.processes = []

    @contextmanager
    def started(self):
        """Around the start of the workers."""
        others = set(active_children())
        # A signal that comes while they start would find their parent's handlers in them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, stops.SIGNALS) if hasattr(signal, "pthread_sigmask") else None
        try:
            yield
        finally:
            if mask is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.processes = [process for process in active_children() if process not in others]
        atexit.register(self._kill_at_exit)  # else multiprocessing waits for them there, and they do not hear it
        self._hold_deaths()

    def _hold_deaths(self):
        """Have a death told at the next batch. PyTorch's handler raises wherever the trainer is, in a save perhaps."""
        if not self.processes or not hasattr(signal, "SIGCHLD") or current_thread() is not main_thread():
            return
        tell = signal.getsignal(signal.SIGCHLD)
        tell = getattr(tell, "raises", tell)

        def hold(number, frame):
            try:
                tell(number, frame)
            except RuntimeError as error:
                self.died = self.died or error

        hold.raises = tell
        signal.signal(signal.SIGCHLD, hold)

    def have_died(self):
        """Whether one has, as far as is known after a moment."""
        late = time.monotonic() + self.LAST_WORDS
        while time.monotonic() < late:
            time.sleep(0.05)  # first of all for the signal that tells more than is_alive
            if self.died is not None or not all(process.is_alive() for process in self.processes):
                return True
        return False

    def check(self):
        if self.died is not None and not all(process.is_alive() for process in self.processes):
            raise self.died

    def end(self, batches):
        """Tell the workers of an iterator to end, and kill those that do not. Nothing is left to do at exit."""
        if not self.processes:
            return
        late = Timer(self.LAST_WORDS, self.kill)
        late.daemon = True
        late.start()
        try:
            batches._shutdown_workers()  # not left to __del__, which may come when it is too late to wait
        finally:
            late.cancel()
            self.kill()
            self.processes = []
            atexit.unregister(self._kill_at_exit)

    def kill(self):
        for process in self.processes:
            process.kill()

    def _kill_at_exit(self):
        self.kill()
        self.processes = []  # a generator that is closed later than this can neither start a thread nor wait


def _leave_signals_to_parent(worker):
    """A launcher signals every process of a job. A worker ends when its parent does, and not before."""
    for number in stops.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = lambda *error: None  # the thread that hands batches over uses it, when their reader is gone
    torch.set_num_threads(1)
