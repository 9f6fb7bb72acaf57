"""One thread at a time works with a model.

Localizers, metrics and generation wait until another thread's call on the same model has ended. While another thread
keeps an ablation, a mask or an injection open, which may take for ever, they are refused. Threads that each have a
copy of the model (`copy.deepcopy`) never meet. A plain `model(tokens)` takes no turn.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn


@dataclass
class _Turn:
    thread: int
    depth: int = 0
    contexts: int = 0


_turns: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()
_changed = threading.Condition()


@contextmanager
def turn(model: nn.Module, context: bool = False) -> Iterator[None]:
    """Keep other threads from working with the model; within one thread, turns nest.

    Args:
        model: which all threads share.
        context: the turn lasts as long as a context of the user's.

    Raises:
        ValueError: if another thread has a context open.
    """
    mine = _take(model, context)
    try:
        yield
    finally:
        with _changed:
            mine.depth -= 1
            mine.contexts -= context
            if not mine.depth:
                del _turns[model]
                _changed.notify_all()


def _take(model: nn.Module, context: bool) -> _Turn:
    with _changed:
        while (current := _turns.get(model)) is not None and current.thread != threading.get_ident():
            if current.contexts:
                raise ValueError(
                    "another thread has an ablation, a mask or an injection of this model open; wait until it is "
                    "closed, or give each thread a copy of the model (copy.deepcopy)"
                )
            _changed.wait()
        mine = _turns.setdefault(model, _Turn(threading.get_ident()))
        mine.depth += 1
        mine.contexts += context
        return mine
