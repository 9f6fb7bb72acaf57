"""The settings of a DEL run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from memloc_lens.ablation import Ablation
from memloc_lens.benchmarks.adaptive import SMALLEST, Budget, check_budget
from memloc_lens.checks import check_choice, check_number
from memloc_lens.components import Scope, component_of
from memloc_lens.localizers import HardConcrete, Slimming
from memloc_lens.models import EMBEDDED
from memloc_lens.runs.methods import AnyLocalizer, configured
from memloc_lens.runs.settings import RunSettings
from memloc_lens.smallest_set import Until

RATIOS: Mapping[str, tuple[float, ...]] = {"neuron": (0.001, 0.005), "head": (0.1, 0.2), "weight": (0.001, 0.005)}
"""Default shares: the paper's for neurons; heads are few."""
EMBEDDED_RATIOS = {"neuron": (0.01, 0.05, 0.1), "head": (0.17, 0.34), "weight": (0.001, 0.01, 0.05)}
"""Default shares for the embedded model, whose layers are narrow: of its 6 heads a layer, 1 and 2."""


@dataclass(frozen=True)
class DeletionSettings(RunSettings):
    """One run of the DEL benchmark.

    Args:
        data: Memorized sequences: JSON lines with "all" and "prompt_len", or another format that is read. Default:
            the embedded model's sequences.
        prompt_len: Number of tokens in the prompts of data that do not say. Default: 32 for token ids.
        ratios: Shares of every layer's components to drop. Default: 0.001 0.005 (the paper's); for the embedded model,
            whose layers are narrow, 0.01 0.05 0.1; other shares for heads and weights.
        limit: Number of target sequences, the first of the data; 0 takes all.
        out: Folder of the run. An interrupted run resumes when you repeat the command.
        negatives: Number of other memorized sequences to measure the damage on, drawn once; 0 takes all.
        controls: Number of control sequences to measure the damage on, if the data has any; 0 takes all.
        text: Unrelated text for the perplexity: a text file, or JSON lines with "text". Default: held-out text of
            the embedded model, which is prose about Python.
        text_tokens: Number of tokens of that text.
        first_layer: First layer to localize in and to drop from; the paper leaves out layer 0. Overrides the methods'
            own first_layer.
        scope: Take the share of every layer, or of all layers together.
        ablation: Set dropped activations to zero, to their mean over the perplexity text, or halve them.
        seed: Seed of the draws of negatives and controls.
        bos: Put a beginning-of-sequence token before every text, as one more token of the prompt. Default: what the
            model's tokenizer is configured to do.
        batch: Number of sequences that are localized or evaluated at a time.
        until: Also find, for each method and target, the smallest set without which the target cannot be extracted, and
            measure there: "unextractable" or "greedy" by greedy decoding, "accuracy", or "sampled".
        until_limit: What must be less: tokens that greedy decoding gets right from the start (default: half of the
            suffix), accuracy in points (50), or probability that a sample is the suffix (0.1).
        until_samples: Number of samples for "sampled".
        prompts: Also generate from other prompts of the targets: the last half of the prompt, and the prompt with every
            8th token replaced. Recorded as self_cut_acc and self_perturbed_acc.
    """

    # chosen on the embedded model's dev sequences: docs/results/components.md
    presets: ClassVar[Mapping[str, Mapping[str, AnyLocalizer]]] = {
        "head": {"hard-concrete": HardConcrete(penalty=1.0), "slimming": Slimming(penalty=1.0)},
        "weight": {"hard-concrete": HardConcrete(penalty=30.0), "slimming": Slimming(penalty=30.0)},
    }

    data: str | Path | None = None
    prompt_len: int | None = None
    ratios: tuple[float, ...] = ()
    limit: int = 8
    out: Path = Path("runs/del")
    negatives: int = 32
    controls: int = 8
    text: Path | None = None
    text_tokens: int = 1024
    first_layer: int = 1
    scope: Scope = "layer"
    ablation: Ablation = "zero"
    seed: int = 0
    batch: int = 16
    until: Until | None = None
    until_limit: float | None = None
    until_samples: int = 1000
    prompts: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_len is not None:
            check_number("prompt_len", self.prompt_len, least=1, whole=True)
        for name in ("negatives", "controls", "first_layer"):
            check_number(name, getattr(self, name), least=0, whole=True)
        for name in ("batch", "text_tokens"):
            check_number(name, getattr(self, name), least=1, whole=True)
        check_choice("scope", self.scope, ("layer", "global"))
        check_choice("ablation", self.ablation, ("zero", "mean", "scale"))
        if self.ablation == "mean" and self.component == "weight":
            raise ValueError("ablation is 'mean', and single weights have no activations; use 'zero' or 'scale'")
        check_budget(self.until, self.until_limit, self.until_samples)

    def localizers(self) -> list[AnyLocalizer]:
        """Return the methods of the run, with its `first_layer` if they have one."""
        return [
            configured(localizer, self.component, first_layer=self.first_layer) for localizer in super().localizers()
        ]

    def with_ratios(self) -> "DeletionSettings":
        """Return the settings with the default shares for the model, if none are given."""
        default = EMBEDDED_RATIOS if self.model == EMBEDDED.name else RATIOS
        return replace(self, ratios=self.ratios or default[self.component])

    @property
    def budget(self) -> Budget | None:
        """What smallest sets are asked for, if any."""
        if self.until is None:
            return None
        own = (self.until, self.until_limit, self.until_samples)
        return Budget(*own, self.first_layer, self.scope, component_of(self.component), self.ablation)

    @property
    def measured_at(self) -> tuple[float, ...]:
        """The ratios of the records of a method."""
        return (*self.ratios, *([] if self.until is None else [SMALLEST]))
