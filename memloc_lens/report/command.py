"""One page about DEL and INJ runs and audited erasures, to read in a browser and to send to a colleague.

``python -m memloc_lens.report RUN... -o report.html``

The page is one file without any request to the network. It holds what was run, the summaries with intervals, pictures
with the numbers behind them, the text of every target before and after its components are dropped, and what the most
located neurons do. Of an erased checkpoint it holds what was erased and at what cost, and what its audit found.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from memloc_lens.benchmarks.finished_del import load_same_model
from memloc_lens.checks import check_number
from memloc_lens.models import check_device
from memloc_lens.plots import save_figure
from memloc_lens.report.cards import sequence_cards
from memloc_lens.report.erasures import erasure_section, is_erased
from memloc_lens.report.neurons import neuron_cards
from memloc_lens.report.page import ErasureSection, RunSection, render
from memloc_lens.report.pictures import Missing, Picture, pictures
from memloc_lens.report.summaries import about, tables
from memloc_lens.runs.command_line import parser, run_command
from memloc_lens.runs.disk import write_whole
from memloc_lens.runs.finished import FinishedRun, read_run
from memloc_lens.runs.records import read_table
from memloc_lens.runs.visible import visible


@dataclass(frozen=True)
class ReportSettings:
    """What to report.

    Args:
        runs: Folders of finished DEL and INJ runs, and of erased checkpoints with an audit.
        out: HTML file to write.
        figures: Folder to save the pictures to as well, as SVG and PNG at the width of a paper's column.
        ratio: Ratio of the DEL runs for pictures of one ratio and for neurons. Default: the largest.
        neurons: Number of neurons to describe in each DEL run on neurons; 0 describes none.
        text: Other text to look for tokens on which they fire: a text file, or JSON lines with "text". Default:
            held-out text of the embedded model.
        without_model: Do not load the models of the runs: the page then has no texts and no neurons.
        device: Device of the models. Default: CUDA if there is one, else the CPU.
        n_devices: Number of GPUs that share the layers of a model, from the device on.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    figures: Path | None = None
    ratio: float | None = None
    neurons: int = 24
    text: Path | None = None
    without_model: bool = False
    device: str | None = None
    n_devices: int = 1

    def __post_init__(self) -> None:
        check_device(self.device, self.n_devices)
        check_number("neurons", self.neurons, least=0, whole=True)
        if not self.runs:
            raise ValueError("no run was given; give the folders of finished DEL and INJ runs or of erasures")
        if len(set(self.runs)) < len(self.runs):
            raise ValueError(f"runs are {' '.join(map(str, self.runs))}; name each once")
        if self.out.is_dir():
            raise ValueError(f"out is {self.out}, a folder; give the file to write, such as {self.out / 'report.html'}")


def main() -> None:
    """Run the command line: ``python -m memloc_lens.report --help``."""
    run_command(parser(ReportSettings, "python -m memloc_lens.report", __doc__), write_report, show)


def write_report(settings: ReportSettings) -> Path:
    """Write a page about runs and erasures, and return its file.

    Args:
        settings: the runs and the file.

    Raises:
        ValueError: if a folder holds neither a finished DEL or INJ run nor an audit of an erasure, or a run's model or
            data is not what it was.
        OSError: if the file cannot be written.
    """
    found = [erasure_section(folder) if is_erased(folder) else _read(folder) for folder in settings.runs]
    sections = [each if isinstance(each, ErasureSection) else _section(settings, each) for each in found]
    if settings.figures:
        for section in sections:
            _save(settings.figures / visible(section.name), section.pictures)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    page = render(sections)
    write_whole(settings.out, lambda part: part.write_text(page, encoding="utf-8"))
    return settings.out


def _read(folder: Path) -> FinishedRun:
    """Read a finished run of either benchmark."""
    try:
        benchmark = read_table(folder / "summary.json").get("benchmark")
    except (OSError, ValueError):
        benchmark = None  # `read_run` says what is wrong
    return read_run(folder, "inj" if benchmark == "inj" else "del")


def _section(settings: ReportSettings, run: FinishedRun) -> RunSection:
    is_del = run.summary["benchmark"] == "del"
    ratio = run.check_ratio(settings.ratio, max(run.ratios)) if is_del else None
    section = RunSection(run.path.name, run.summary["benchmark"], about(run), tables(run), pictures(run, ratio))
    if not is_del or settings.without_model:
        return section
    model = load_same_model(run, settings.device, settings.n_devices)
    section.cards = sequence_cards(run, model)
    if settings.neurons and run.config["component"] == "neuron":
        assert ratio is not None
        section.neurons = neuron_cards(run, model, ratio, settings.neurons, settings.text)
    return section


def _save(folder: Path, drawn: list[Picture | Missing]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for picture in (each for each in drawn if isinstance(each, Picture)):
        for suffix in ("svg", "png"):
            save_figure(picture.figure, folder / f"{picture.name}.{suffix}")


def show(settings: ReportSettings, written: Path) -> None:
    """Say where the page is."""
    print(f"report: {visible(written)} ({written.stat().st_size / 1e6:.1f} MB)")
    if settings.figures:
        print(f"figures: {visible(settings.figures)}")
