"""The command line: options from dataclasses, configuration files, and errors of one line."""

import argparse
import math
import signal
import sys
import threading
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import field, fields, is_dataclass, make_dataclass, replace
from keyword import iskeyword
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from memloc_lens.localizers import FURTHER, LOCALIZERS, WRAPPERS
from memloc_lens.runs.methods import AnyLocalizer, name_of, resolve
from memloc_lens.runs.schema import Published
from memloc_lens.runs.settings import RunSettings
from memloc_lens.runs.visible import visible

Settings = TypeVar("Settings")
BenchmarkSettings = TypeVar("BenchmarkSettings", bound=RunSettings)

STOPPED = "\nstopped; what was recorded is kept: repeat the command to resume"

METHODS_HELP = (
    f"Methods to compare: {', '.join(LOCALIZERS | FURTHER)}; with {' or '.join(f'{wrapper}-' for wrapper in WRAPPERS)} "
    "before a name, the method wrapped with the context; or your own as package.module:Class, whose fields become "
    "options. "
    f"Default: all that can score the component but {' and '.join(FURTHER)}."
)


def run_command(
    read: Callable[[list[str]], Settings],
    run: Callable[[Settings], Any],
    show: Callable[[Settings, Any], None],
    arguments: list[str] | None = None,
) -> None:
    """Read the settings, run, and show the result; an error is one line, and Ctrl-C or SIGTERM say how to resume.

    After SIGTERM the exit status is 143.

    Args:
        read: makes settings of the arguments.
        run: the command, from settings to result.
        show: prints the result.
        arguments: of the command line. Default: those of the process.
    """
    try:
        with _interrupted_by_sigterm():
            settings = read(sys.argv[1:] if arguments is None else arguments)
            show(settings, run(settings))
    except ValueError as error:
        sys.exit(f"error: {visible(error)}")
    except OSError as error:  # of a disk or a temporary folder, wherever it is used
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {visible(where)}{visible(error.strerror or error)}")
    except Terminated:
        print(STOPPED, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        sys.exit(STOPPED)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a batch system sends before it kills: ends a run as Ctrl-C does."""


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM while the context is open; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    is_told = False

    def terminate(*_: object) -> None:
        nonlocal is_told
        is_told = True
        raise Terminated

    earlier = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as error:  # ray raises one of its own in place of ours
        raise (Terminated if is_told else type(error)) from error
    finally:
        signal.signal(signal.SIGTERM, earlier)


def parser(settings_class: type[Settings], program: str, about: str | None) -> Callable[[list[str]], Settings]:
    """Return a function that reads settings from arguments, for `run_command`.

    Args:
        settings_class: a dataclass whose fields are the options.
        program: the name of the command.
        about: shown by ``--help``.
    """
    return lambda arguments: _cli(settings_class, program, about, arguments)


def benchmark_parser(
    settings_class: type[BenchmarkSettings], program: str, about: str | None
) -> Callable[[list[str]], BenchmarkSettings]:
    """Return a function that reads a benchmark's settings; options of the methods follow from their classes."""
    return lambda arguments: parse(settings_class, program, about, arguments)


def parse(
    settings_class: type[BenchmarkSettings], program: str, about: str | None, arguments: list[str]
) -> BenchmarkSettings:
    """Read a benchmark's settings.

    1. ``--config``, ``--component`` and ``--methods`` are looked up first: the file's settings come before those of the
       command line, so that the latter override them; the kind of component decides the defaults of the methods; and
       methods of the user's own bring options of their own.
    2. The fields of each method become options under its name, as ``--hard-concrete.lr``.

    Raises:
        ValueError: if the file cannot be read, or a method or setting cannot be used.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--methods", nargs="*")
    first.add_argument("--component", default=settings_class.component)
    config = first.parse_known_args(arguments)[0].config
    table = _read_toml(config) if config else {}
    table.pop("published", None)
    or_default = {field.name for field in fields(settings_class) if field.type == bool | None}
    arguments = [*_options({name: str(on) if name in or_default else on for name, on in table.items()}), *arguments]
    found = first.parse_known_args(arguments)[0]
    presets = settings_class.presets.get(found.component, {})
    known = {name: resolve(name, presets) for name in LOCALIZERS | FURTHER}
    known |= {name: resolve(name, presets) for name in found.methods or () if name not in known}
    configurable = {_identifier(localizer): localizer for localizer in known.values() if is_dataclass(localizer)}
    options = make_dataclass(
        "Options",
        [
            (identifier, Annotated[type(localizer), tyro.conf.arg(name=name_of(localizer))], field(default=localizer))
            for identifier, localizer in configurable.items()
        ],
    )
    command = make_dataclass(
        "Command",
        [
            ("settings", Annotated[settings_class, tyro.conf.arg(name="")]),
            ("methods", Annotated[tuple[str, ...], tyro.conf.arg(help=METHODS_HELP)], ()),
            ("options", Annotated[options, tyro.conf.arg(name="")], field(default_factory=options)),
        ],
    )
    parsed: Any = _cli(command, program, about, arguments)
    chosen = {name: getattr(parsed.options, _identifier(localizer), localizer) for name, localizer in known.items()}

    def named(name: str) -> AnyLocalizer:
        """Return a method as configured, and so the method that a wrapper is around."""
        localizer = chosen.get(name) or resolve(name)
        wraps = type(localizer) in WRAPPERS.values() and ":" not in name
        inner = {"localizer": named(name.partition("-")[2])} if wraps else {}
        return replace(localizer, **inner) if inner else localizer  # type: ignore[type-var]

    if parsed.methods:
        methods = tuple(named(name) for name in parsed.methods)
    else:
        able = RunSettings(component=parsed.settings.component).localizers()
        methods = tuple(chosen[name_of(localizer)] for localizer in able)
    return replace(parsed.settings, methods=methods)


def published(config: Path | None) -> Published:
    """Return the published figures of a configuration file, none without one.

    Raises:
        ValueError: if the file cannot be read, or they are not numbers by method, ratio and metric.
    """
    table = _read_toml(config).get("published", {}) if config else {}
    for method, ratios in _items(table):
        for ratio, figures in _items(ratios):
            where = ".".join(filter(None, ("published", method, ratio)))
            if not isinstance(figures, dict) or not all(map(_is_figure, figures.values())):
                raise ValueError(
                    f'{config}: [{where}] does not hold numbers by metric; write [published.METHOD."RATIO"] and, under '
                    "it, self_acc = -34.6"
                )
            if not _is_ratio(ratio):
                raise ValueError(f'{config}: [{where}] has {ratio!r} in place of a ratio; write a number as "0.05"')
    return {
        method: {str(float(ratio)): figures for ratio, figures in ratios.items()} for method, ratios in table.items()
    }


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_ratio(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False


def _items(table: Any) -> Iterable[tuple[str, Any]]:
    """Return what a table of the file holds; what stands in place of a table holds nothing."""
    return table.items() if isinstance(table, dict) else [("", None)]


def _cli(kind: type[Settings], program: str, about: str | None, arguments: list[str]) -> Settings:
    invoked = sys.argv[0]  # the console script names its commands there
    return tyro.cli(kind, prog=invoked if invoked.startswith("memloc ") else program, description=about, args=arguments)


def _identifier(localizer: AnyLocalizer) -> str:
    name = name_of(localizer).replace("-", "_")
    return f"{name}_" if iskeyword(name) else name


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"the configuration {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the configuration {path} is not TOML: {error}") from error


def _options(table: dict[str, Any], prefix: str = "--") -> Iterator[str]:
    """Turn a table of settings into the options that say the same."""
    for name, value in table.items():
        option = name.replace("_", "-")
        if isinstance(value, dict):
            yield from _options(value, f"{prefix}{option}.")
        elif isinstance(value, bool):
            yield f"{prefix}{'' if value else 'no-'}{option}"
        else:
            yield prefix + option
            yield from map(str, value if isinstance(value, list) else [value])
