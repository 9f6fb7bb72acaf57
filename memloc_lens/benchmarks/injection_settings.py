"""The settings of an INJ run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from memloc_lens.benchmarks.tuning import GRIDS
from memloc_lens.checks import check_number
from memloc_lens.localizers import HardConcrete, Slimming
from memloc_lens.models import EMBEDDED
from memloc_lens.runs.methods import AnyLocalizer, name_of
from memloc_lens.runs.settings import RunSettings

EMBEDDED_RATIOS, RATIOS = (0.01, 0.05), (0.01, 0.001)
"""Default shares: those for the embedded model, and the paper's."""


@dataclass(frozen=True)
class InjectionSettings(RunSettings):
    """One run of the INJ benchmark.

    Args:
        data: Texts to inject: JSON lines with "definition", "text" or "all", a text file with a text a line, or the
            name owner/name of a data set on the hub. Default: 60 definitions of things that do not exist.
        component: Kind of the ground truth, and of the components to locate: neuron, or weight for single weights of
            W_out.
        ratios: Shares of all components to inject a text into. Default: 0.01 0.001 (the paper's); for the embedded
            model 0.01 0.05, because 0.001 would be 5 neurons, too few for a sentence.
        limit: Number of texts, the first of the data; 0 takes all.
        out: Folder of the run. An interrupted run resumes when you repeat the command.
        max_tokens: Maximum number of tokens of a text; longer ones are cut. 0 cuts nothing, and refuses texts that
            the model cannot read whole.
        lr: Learning rate of the injection; 0 takes the paper's: 0.01 for ratios of 1% and more, 0.05 for smaller ones.
        max_steps: Maximum number of Adam steps of the injection.
        target_loss: The injection ends, and has succeeded, when the loss of the text is under this value, in nats.
        keep_norms: Keep the length of every row of W_out while injecting, so that its norm tells nothing. Not in the
            paper.
        context: Text that some methods read besides their targets: a text file, or JSON lines with "text". Default:
            none, because an injection makes the ground truth matter for all text.
        context_sequences: Number of the embedded model's memorized sequences that they read. Default: 0.
        tune: Instead of running, try the released settings of the learned masks on the 5 texts of the split "dev" (of
            the package's own or a hub data set; of another file the first 5), and write the best to
            OUT/tuning/tuned.toml.
        seed: Seed of the draw of the ground truth, to which the index of the text in the data is added.
        bos: Put a beginning-of-sequence token before every text, as one more token of the prompt. Default: what the
            model's tokenizer is configured to do.
    """

    # chosen for the embedded model by --tune: benchmarks/results/tuning.md
    presets: ClassVar[Mapping[str, Mapping[str, AnyLocalizer]]] = {
        "neuron": {
            "hard-concrete": HardConcrete(penalty=120.0),
            "slimming": Slimming(steps=200, lr=1e-3, penalty=1200.0),
        }
    }

    data: str | Path | None = None
    ratios: tuple[float, ...] = ()
    limit: int = 10
    out: Path = Path("runs/inj")
    max_tokens: int = 0
    lr: float = 0.0
    max_steps: int = 200
    target_loss: float = 0.05
    keep_norms: bool = False
    tune: bool = False
    seed: int = 0
    context: Path | None = None
    context_sequences: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("max_tokens", self.max_tokens, least=0, whole=True)
        check_number("lr", self.lr, least=0)
        check_number("max_steps", self.max_steps, least=1, whole=True)
        check_number("target_loss", self.target_loss, above=0)
        if self.component == "head":
            raise ValueError("component is 'head'; INJ writes texts into weights of W_out: use 'neuron' or 'weight'")
        if self.keep_norms and self.component != "neuron":
            raise ValueError("keep_norms keeps the lengths of rows of W_out; it needs component 'neuron'")
        if self.tune and self.parallel.engine != "serial":
            raise ValueError(f"engine is {self.parallel.engine!r}, and tune runs in one process; leave out one of them")
        if self.tune and not any(name_of(localizer) in GRIDS for localizer in self.localizers()):
            raise ValueError(f"tune chooses settings of {' and '.join(GRIDS)}, and none of them is among the methods")
        for ratio in self.ratios:
            check_number("the ratio", ratio, above=0, below=1)  # with all in the ground truth, nothing is to be found

    def with_ratios(self) -> "InjectionSettings":
        """Return the settings with the default shares for the model, if none are given."""
        return replace(self, ratios=self.ratios or (EMBEDDED_RATIOS if self.model == EMBEDDED.name else RATIOS))
