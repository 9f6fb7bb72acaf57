"""Run without progress bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from threading import Lock
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, runtime_checkable

from tqdm import tqdm


@runtime_checkable
class Settings(Protocol):
    """Settings that say whether bars are shown."""

    @property
    def quiet(self) -> bool: ...  # noqa: D102


AnySettings = TypeVar("AnySettings", bound=Settings)
Rest = ParamSpec("Rest")
Result = TypeVar("Result")

_shown = tqdm.__init__
_lock, _open = Lock(), 0


def may_be_quiet(
    command: Callable[Concatenate[AnySettings, Rest], Result],
) -> Callable[Concatenate[AnySettings, Rest], Result]:
    """Return a command that shows no progress bar if its settings, the first argument, are quiet."""

    @wraps(command)
    def run(settings: AnySettings, *rest: Rest.args, **named: Rest.kwargs) -> Result:
        with without_bars() if settings.quiet else nullcontext():
            return command(settings, *rest, **named)

    return run


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide every progress bar of the process while the context is open: our own, and those of libraries.

    All of them are bars of tqdm. The switches that transformers and datasets have do not reach each other's, nor those
    of GGUF files.

    Example:
        >>> from tqdm.auto import tqdm
        >>> with without_bars():
        ...     tqdm([1, 2]).disable
        True
    """
    _count(+1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    """Count the contexts that are open, in all threads: the last one to close shows bars again."""
    global _open, _shown
    with _lock:
        if _open == 0:
            _shown = tqdm.__init__
        _open += change
        tqdm.__init__ = _hidden if _open else _shown  # type: ignore[method-assign]


def _hidden(bar: Any, *arguments: Any, **options: Any) -> None:
    _shown(bar, *arguments, **options | {"disable": True})
