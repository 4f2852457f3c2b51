"""DrawsAhead: while one minibatch trains on a GPU, a thread draws the random numbers of the next.

Drawing a minibatch's random starts on the host takes milliseconds, in which the training thread
starts no kernels. The next minibatch nearly always asks for the same draws, so a thread makes them
in the meantime and puts them into pinned memory. The numbers stay the same, because a draw is used
only if the generator's state is the one from which it was made.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from base.seeding import derived_seed, torch_generator

Distribution = Callable[..., Tensor]
Key = tuple[int, str, int, int]
"""What seeds a generator: the run's seed, the purpose, the epoch and the minibatch's number."""
WHOLE = slice(None)
THREAD = "draws ahead"


def draw(
    distribution: Distribution,
    shape: Sequence[int],
    generator: torch.Generator,
    part: slice = WHOLE,
) -> Tensor:
    """Return `distribution(shape, generator=generator, dtype=torch.float32)[part]`, which may have
    been drawn ahead.

    Args:
        distribution: `torch.rand`, `torch.randn`, or another function of a shape with the arguments
            `generator` and `dtype`.
        shape: of the whole draw.
        generator: moves on as if all of it were drawn now.
        part: of the first dimension.
    """
    if isinstance(generator, _GeneratorAhead):
        return generator.draw(distribution, tuple(shape), part)
    return _drawn(distribution, shape, generator)[part]


def _drawn(distribution: Distribution, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    # float32 also under another default dtype, which would give other numbers
    return distribution(shape, generator=generator, dtype=torch.float32)


class DrawsAhead:
    """Makes the generators of minibatches; inside `thread` they draw ahead for one another."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._next: dict[str, _GeneratorAhead] = {}

    @contextmanager
    def thread(self, device: torch.device) -> Iterator[None]:
        """Let a thread draw ahead for a CUDA device within the context.

        It starts with the first draw that it is asked for, and has ended when the context exits,
        even after an error.
        """
        index = device.index
        if index is None:
            index = torch.cuda.current_device()
        # A new thread's own device is the first one, on which it must not take memory
        with ThreadPoolExecutor(1, THREAD, torch.cuda.set_device, (index,)) as thread:
            self._thread = thread
            try:
                yield
            finally:
                self._thread = None
                self._next.clear()

    def generator(self, key: Key, is_last: bool) -> torch.Generator:
        """Return the CPU generator of a minibatch; see `base.seeding.torch_generator`.

        Args:
            key: see `Key`.
            is_last: whether it is the epoch's last minibatch; then nothing is drawn ahead.
        """
        if self._thread is None:
            return torch_generator(*key)
        seed, purpose, epoch, batch = key
        generator = self._next.pop(purpose, None)
        if generator is None or generator.key != key:
            generator = _GeneratorAhead(key, self._thread)
        if not is_last:
            following = _GeneratorAhead((seed, purpose, epoch, batch + 1), self._thread)
            generator.following = self._next[purpose] = following
        return generator


class _GeneratorAhead(torch.Generator):
    """A generator of a minibatch. It can be used like any other; `draw` takes what the thread has
    drawn, and has the thread draw the same for the minibatch after it.

    Args:
        key: see `Key`.
        thread: in which draws are made ahead.

    Attributes:
        following: the generator of the minibatch after it, if it is known.
    """

    def __new__(cls, *_: object) -> Self:
        return super().__new__(cls)

    def __init__(self, key: Key, thread: ThreadPoolExecutor) -> None:
        self.manual_seed(derived_seed(*key))
        self.key = key
        self.following: _GeneratorAhead | None = None
        self._thread = thread
        # The thread's own generator: no two threads share one
        self._ahead = torch_generator(*key)
        self._drawn: deque[tuple[tuple[Any, ...], Future[tuple[Tensor, ...]]]] = deque()

    def draw(self, distribution: Distribution, shape: tuple[int, ...], part: slice) -> Tensor:
        """See `draw`.

        Raises:
            Exception: whatever the thread has raised.
        """
        wanted = (distribution, shape, part)
        if self.following is not None:
            self.following.order(*wanted)
        if self._drawn:
            foreseen, future = self._drawn.popleft()
            if foreseen == wanted:
                before, numbers, after = future.result()
                if torch.equal(before, self.get_state()):
                    self.set_state(after)
                    return numbers
        return _drawn(distribution, shape, self)[part]

    def order(self, *wanted: Any) -> None:
        """Have the thread make a draw of this generator's."""
        self._drawn.append((wanted, self._thread.submit(self._draw_ahead, *wanted)))

    def _draw_ahead(
        self, distribution: Distribution, shape: tuple[int, ...], part: slice
    ) -> tuple[Tensor, ...]:
        """Return the state before a draw, the draw in pinned memory, and the state after it."""
        before = self._ahead.get_state()
        numbers = _drawn(distribution, shape, self._ahead)[part]
        # A fresh tensor: its memory is used again only when the copy to the device is complete.
        # Contiguous, as torch copies others by way of memory that is not pinned
        return before, numbers.contiguous().pin_memory(), self._ahead.get_state()
