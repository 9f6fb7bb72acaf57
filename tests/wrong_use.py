"""What users get wrong. `python tests/wrong_use.py` prints what each case raises, without the suite's type checker.

A case is the words that the error must hold, and a function of the `Things` that it can use.
"""

import json
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from conftest import VOCAB, make_original, random_sequence
from memloc_lens import (
    HEADS,
    LOCALIZERS,
    NEURONS,
    WEIGHTS,
    Activations,
    ComponentSet,
    Contrast,
    Gradient,
    HardConcrete,
    IntegratedGradients,
    IterativeGradient,
    MemorizedSequence,
    Neurons,
    Protect,
    Random,
    Slimming,
    WeightNorm,
    ZeroOut,
    ablate,
    inject,
    load_definitions,
    load_model,
    load_sequences,
    mask,
    mean_activations,
    memory_budget,
    set_from_indices,
    smallest_set,
    top_components,
    top_neurons,
)
from memloc_lens.forward import PrefixCache
from memloc_lens.localizers import Localizer
from memloc_lens.metrics import (
    auroc,
    average_precision,
    free_running,
    perplexity,
    recall,
    recall_ceiling,
    row_losses,
    suffix_loss,
    teacher_forced,
)
from memloc_lens.models import EMBEDDED
from memloc_lens.plots import frontier_figure, save_figure, score_map


class Things:
    """What the cases use: a model, what fits it, and what does not."""

    sequence = random_sequence()
    rows = torch.arange(20).view(2, 10)
    scores = torch.rand(6, 768)
    neurons = Neurons(torch.rand(6, 768) < 0.1)
    no_neurons = Neurons(torch.zeros(6, 768, dtype=torch.bool))
    heads = ComponentSet(torch.rand(6, 6) < 0.5, HEADS)
    weights = ComponentSet(torch.rand(6, 768, 192) < 0.1, WEIGHTS)

    @cached_property
    def model(self) -> HookedTransformer:
        return load_model(device="cpu")

    @cached_property
    def transformers_model(self) -> Any:
        return make_original("gpt2")

    @cached_property
    def attention_only(self) -> HookedTransformer:
        shape = dict(n_layers=2, d_model=8, n_ctx=40, d_head=4, n_heads=2, d_vocab=VOCAB)
        return HookedTransformer(HookedTransformerConfig(attn_only=True, **shape))


Case = tuple[str, Callable[[Things], Any]]
CASES: dict[str, Case] = {}

WRONG: dict[str, Callable[[Things], Any]] = {
    "a tensor": lambda it: torch.ones(4),
    "a string": lambda it: "embedded",
    "None": lambda it: None,
    "a model of transformers": lambda it: it.transformers_model,
}

QUICK: dict[str, Callable[[], Localizer]] = dict(LOCALIZERS) | {
    "slimming": lambda: Slimming(steps=1),
    "hard-concrete": lambda: HardConcrete(steps=1),
    "integrated-gradients": lambda: IntegratedGradients(steps=1),
    "zero-out": lambda: ZeroOut(candidates=0.01),
    "iterative-gradient": lambda: IterativeGradient(rounds=1),
}


def entered(context: Any) -> None:
    with context:
        pass


# --- in place of a model, a sequence, scores or a set

OF_MODELS: dict[str, Callable[[Things, Any], Any]] = {
    "ablate": lambda it, x: entered(ablate(x, it.neurons)),
    "mask": lambda it, x: entered(mask(x, torch.ones(6, 768))),
    "HEADS.masked": lambda it, x: entered(HEADS.masked(x, torch.ones(6, 6))),
    "inject": lambda it, x: entered(inject(x, it.sequence)),
    "teacher_forced": lambda it, x: teacher_forced(x, [it.sequence]),
    "free_running": lambda it, x: free_running(x, [it.sequence]),
    "suffix_loss": lambda it, x: suffix_loss(x, [it.sequence]),
    "perplexity": lambda it, x: perplexity(x, it.rows),
    "mean_activations": lambda it, x: mean_activations(x, [it.sequence]),
    "smallest_set": lambda it, x: smallest_set(x, it.sequence, it.scores),
    "load_sequences": lambda it, x: load_sequences(x),
    "load_definitions": lambda it, x: load_definitions(x),
    "from_text": lambda it, x: MemorizedSequence.from_text(x, "Return the number of items", 2),
    "from_indices": lambda it, x: Neurons.from_indices(x, [(0, 1)]),
    "PrefixCache": lambda it, x: PrefixCache(x, 1),
} | {name: lambda it, x, make=make: make()(x, it.sequence) for name, make in QUICK.items()}

OF_SEQUENCES: dict[str, Callable[[Things, Any], Any]] = {
    "inject": lambda it, x: entered(inject(it.model, x)),
    "teacher_forced": lambda it, x: teacher_forced(it.model, x),
    "teacher_forced of a list": lambda it, x: teacher_forced(it.model, [it.sequence, x]),
    "free_running": lambda it, x: free_running(it.model, [x]),
    "suffix_loss": lambda it, x: suffix_loss(it.model, [x]),
    "mean_activations": lambda it, x: mean_activations(it.model, x),
    "smallest_set": lambda it, x: smallest_set(it.model, x, it.scores),
} | {name: lambda it, x, make=make: make()(it.model, x) for name, make in QUICK.items()}

OF_SETS: dict[str, Callable[[Things, Any], Any]] = {
    "ablate": lambda it, x: entered(ablate(it.model, x)),
    "ablate of a list": lambda it, x: entered(ablate(it.model, [it.neurons, x])),
    "|": lambda it, x: it.neurons | x,
    "&": lambda it, x: it.neurons & x,
    "-": lambda it, x: it.neurons - x,
    "overlap": lambda it, x: it.neurons.overlap(x),
    "recall": lambda it, x: recall(it.neurons, x),
    "recall of ground truth": lambda it, x: recall(x, it.neurons),
    "recall_ceiling": lambda it, x: recall_ceiling(x, 0.1),
    "auroc": lambda it, x: auroc(it.scores, x),
}

OF_SCORES: dict[str, Callable[[Things, Any], Any]] = {
    "top_neurons": lambda it, x: top_neurons(x, 0.5),
    "top_components": lambda it, x: top_components(x, 0.5, component=HEADS),
    "smallest_set": lambda it, x: smallest_set(it.model, it.sequence, x),
    "auroc": lambda it, x: auroc(x, it.neurons),
    "average_precision": lambda it, x: average_precision(x, it.heads),
}

OF_TENSORS: dict[str, Callable[[Things, Any], Any]] = {
    "mask": lambda it, x: entered(mask(it.model, x)),
    "Neurons": lambda it, x: Neurons(x),
    "ComponentSet": lambda it, x: ComponentSet(x, HEADS),
    "perplexity": lambda it, x: perplexity(it.model, x),
    "row_losses": lambda it, x: row_losses(it.model, x),
}

for place, words, calls in (
    ("the model", r"^the model is .*; give a HookedTransformer, as load_model", OF_MODELS),
    ("a sequence", r"was given; give a MemorizedSequence or a list of them, as load_sequences", OF_SEQUENCES),
    ("a set", r"^the (components are|other set is|ground truth is) .*; give ", OF_SETS),
    ("scores", r"^scores (are|is|have|of shape) .*(was expected|those of one sequence are|do not fit)", OF_SCORES),
    ("a tensor", r"was expected|do not fit|tokens must be whole numbers|is one row of at least 2", OF_TENSORS),
):
    for name, call in calls.items():
        for wrong, make in WRONG.items():
            CASES[f"{name}: {wrong} for {place}"] = (words, lambda it, call=call, make=make: call(it, make(it)))

for name, call in OF_MODELS.items():
    words = "has attention layers only, and so no MLP neurons to locate or ablate$"
    CASES[f"{name}: attention only"] = (words, lambda it, call=call: call(it, it.attention_only))

# --- tokens, prompt lengths and texts

for tokens in (
    [1.5, 2], [1.0, 2.0], [True, False], ["a"], "ab", [[1, 2], [3]], [1, None], None, {1: 2}, [2**70, 1], 5.0,
    np.array([1.0, 2.0]), np.array([True, False]), np.array([["a"], ["b"]]), torch.tensor([1.0, 2.0]),
    torch.tensor([True, False]),
):  # fmt: skip
    words = "^sequence 'x' has tokens .*; tokens must be whole numbers$"
    CASES[f"tokens {tokens!r}"] = (words, lambda it, tokens=tokens: MemorizedSequence(tokens, 1, id="x"))

for shaped in ([[1, 2]], [[1, 2], [3, 4]], [], 5, torch.ones(2, 3).long()):
    words = r"^sequence 'x' has tokens of shape \[.*\]; a sequence is one row of at least 2 tokens$"
    CASES[f"tokens {shaped!r}"] = (words, lambda it, shaped=shaped: MemorizedSequence(shaped, 1, id="x"))

for prompt_len in (1.0, True, "1", None, np.float32(1)):
    words = "^sequence 'x' has prompt_len .*; it must be a whole number$"
    CASES[f"prompt_len {prompt_len!r}"] = (words, lambda it, x=prompt_len: MemorizedSequence([1, 2], x, id="x"))

for text in ("", None, 5, ["Return"]):
    words = "^the text of sequence '' is .*; give a string$"
    CASES[f"text {text!r}"] = (words, lambda it, text=text: MemorizedSequence.from_text(it.model, text, 1))

CASES["Protect without a context"] = (
    "^protect-slimming has a context of 0 sequences and needs at least 1; ",
    lambda it: Protect(Slimming())(it.model, it.sequence),
)
CASES["Contrast with a context of one"] = (
    "^contrast-gradient has a context of 1 sequences and needs at least 2; ",
    lambda it: Contrast(Gradient(), (it.sequence,))(it.model, it.sequence),
)

CASES["half of a character"] = (
    r"^the text of sequence 'x' has '\\ud83d', half of a character, at character 5; remove it$",
    lambda it: MemorizedSequence.from_text(it.model, "half \ud83d", 1, "x"),
)

# --- settings

SETTINGS: dict[str, tuple[str, Callable[[], Any]]] = {
    "Gradient(objective)": ("^objective is 'accuracy'; ", lambda: Gradient("accuracy")),
    "Gradient(context)": ("^the context has the string 'text'; give a list", lambda: Gradient(context=("text",))),
    "IterativeGradient(schedule)": ("^schedule is 'cubic'; ", lambda: IterativeGradient(schedule="cubic")),
    "IterativeGradient(scope)": ("^scope is 'model'; ", lambda: IterativeGradient(scope="model")),
    "HardConcrete(steps=-1)": ("^steps is -1; it must be a whole number at least 1$", lambda: HardConcrete(steps=-1)),
    "HardConcrete(init=5)": ("^init is 5; it must be a number above 0 and at most 1$", lambda: HardConcrete(init=5)),
    "HardConcrete(temperature=0)": ("^temperature is 0; .* above 0$", lambda: HardConcrete(temperature=0)),
    "HardConcrete(lr=nan)": ("^lr is nan; it must be a number above 0$", lambda: HardConcrete(lr=math.nan)),
    "HardConcrete(lr='fast')": ("^lr is 'fast'; it must be a number", lambda: HardConcrete(lr="fast")),
    "HardConcrete(steps=2.5)": ("^steps is 2.5; it must be a whole number", lambda: HardConcrete(steps=2.5)),
    "HardConcrete(steps=True)": ("^steps is True; it must be a whole number", lambda: HardConcrete(steps=True)),
    "HardConcrete(seed=None)": ("^seed is None; it must be a whole number", lambda: HardConcrete(seed=None)),
    "HardConcrete(component='mlp')": ("^component is 'mlp'; it must be one", lambda: HardConcrete(component="mlp")),
    "HardConcrete(component=['head'])": ("^component is", lambda: HardConcrete(component=["head"])),
    "WeightNorm(component=HEADS)": ("^component is", lambda: WeightNorm(component=HEADS)),
    "Slimming(steps=-4)": ("^steps is -4; it must be a whole number at least 1$", lambda: Slimming(steps=-4)),
    "Slimming(penalty=-1)": ("^penalty is -1; it must be a number at least 0$", lambda: Slimming(penalty=-1)),
    "Slimming(first_layer=-1)": ("^first_layer is -1; .* at least 0$", lambda: Slimming(first_layer=-1)),
    "IntegratedGradients(steps=0)": ("^steps is 0; .* at least 1$", lambda: IntegratedGradients(steps=0)),
    "Activations('mean')": ("^reduction is 'mean'; .* 'abs_mean', 'mean_abs'$", lambda: Activations("mean")),
    "ZeroOut(candidates=0)": ("^candidates is 0; .* above 0 and at most 1$", lambda: ZeroOut(candidates=0)),
    "ZeroOut(component='weight')": ("scores neurons and heads$", lambda: ZeroOut(component="weight")),
    "Random(seed=1.5)": ("^seed is 1.5; it must be a whole number$", lambda: Random(seed=1.5)),
    "load_model(device='banana')": ("^device is 'banana'; .* cpu, cuda", lambda: load_model(device="banana")),
    "load_model(device='cuda')": ("^device is 'cuda', but there is no CUDA", lambda: load_model(device="cuda")),
    "memory_budget(8)": ("^memory is 8; write an amount", lambda: entered(memory_budget(8))),
    "memory_budget('8')": ("^memory is '8'; write an amount", lambda: entered(memory_budget("8"))),
}
CASES |= {name: (words, lambda it, call=call: call()) for name, (words, call) in SETTINGS.items()}

FIRST_LAYERS = {
    "integrated-gradients": lambda layer: IntegratedGradients(steps=2, first_layer=layer),
    "zero-out": lambda layer: ZeroOut(first_layer=layer, candidates=0.02),
    "slimming": lambda layer: Slimming(steps=2, first_layer=layer),
    "hard-concrete": lambda layer: HardConcrete(steps=2, first_layer=layer),
}
for name, make in FIRST_LAYERS.items():
    for layer in (6, 9):
        words = f"^first_layer is {layer}; the model has layers 0 to 5$"
        CASES[f"{name} from layer {layer}"] = (words, lambda it, x=make, layer=layer: x(layer)(it.model, it.sequence))


OF_SMALLEST: dict[str, dict[str, Any]] = {
    "^until is 'never'; it must be one of 'unextractable', 'greedy', 'accuracy', 'sampled'$": dict(until="never"),
    "^the limit in tokens is 0; it must be a whole number at least 1$": dict(limit=0),
    "^the limit in tokens is 2.5; it must be a whole number": dict(until="greedy", limit=2.5),
    "^the limit is 99 tokens and the suffix has 8; it must be at most that$": dict(limit=99),
    "^the limit of the accuracy is 0; it must be a number above 0 and at most 100$": dict(until="accuracy", limit=0),
    "^the limit of the probability is 1.5; .* above 0 and at most 1$": dict(until="sampled", limit=1.5),
    "^the limit of the probability is nan": dict(until="sampled", limit=math.nan),
    "^samples is 0; it must be a whole number at least 1$": dict(samples=0),
    "^first_layer is 6; the model has layers 0 to 5$": dict(first_layer=6),
    "^scope is 'all'; it must be one of 'layer', 'global'$": dict(scope="all"),
    "^kind is 'off'; it must be one of": dict(kind="off"),
    "^component is the string 'head'": dict(component="head"),
    r"^scores have the shape \[6, 768\]; those of one sequence are \[layer, neuron, d_model\]": dict(component=WEIGHTS),
    r"^heads of shape \[6, 768\] .* do not fit embedded, which has \[6, 6\]$": dict(component=HEADS),
    "over=sequences": dict(kind="mean"),
}
for words, wrong in OF_SMALLEST.items():
    CASES[f"smallest_set: {words}"] = (
        words, lambda it, wrong=wrong: smallest_set(it.model, it.sequence, it.scores, **wrong)
    )  # fmt: skip
CASES |= {
    "score_map of a list": (
        r"^scores have the shape \[2, 6, 768\]; those of one sequence are \[layer, neuron\]",
        lambda it: score_map(torch.rand(2, 6, 768)),
    ),
    "score_map of no tensor": ("^scores is of type .*list; a tensor", lambda it: score_map([[1.0]])),
    "frontier_figure(damage)": (
        "^damage is 'neg'; it must be one of 'neg_acc', 'ppl'$",
        lambda it: frontier_figure("run", "neg"),
    ),
    "save_figure(columns)": (
        "^columns is 3; a figure is 1 or 2 columns wide$",
        lambda it: save_figure(score_map(it.scores), "a.png", columns=3),
    ),
    "save_figure(path)": (
        "^'a.gif' ends with '.gif'; write a file that ends with .png, .svg, .pdf$",
        lambda it: save_figure(score_map(it.scores), "a.gif"),
    ),
    "save_figure of something else": (
        "^the figure is of type .*Path; give a figure of plotly$",
        lambda it: save_figure(Path("a.png"), "a.png"),
    ),
}

CASES["smallest_set of two sequences"] = (
    "^2 sequences were given; give one, with its scores$",
    lambda it: smallest_set(it.model, [it.sequence] * 2, it.scores),
)
CASES["smallest_set of scores that are NaN"] = (
    "^4608 of 4608 scores are NaN",
    lambda it: smallest_set(it.model, it.sequence, it.scores * math.nan),
)

# --- how things go together


def with_another_model(it: Things) -> None:
    other = load_model(EMBEDDED, device="cpu")
    teacher_forced(other, [it.sequence], prefix=PrefixCache(it.model, 1))


def ablated_before_the_prefix(it: Things, components: ComponentSet) -> None:
    with ablate(it.model, components):
        teacher_forced(it.model, [it.sequence], prefix=PrefixCache(it.model, 1))


CASES |= {
    "scores of a list": (
        r"^scores have the shape \[2, 6, 768\]; .* one sequence at a time$",
        lambda it: top_neurons(Random()(it.model, [it.sequence] * 2), 0.1),
    ),
    "prefix cache of another model": ("^a prefix cache serves the model it was made for", with_another_model),
    "neurons before a prefix": (
        r"^blocks\.0\.mlp\.hook_post has a hook, and the prefix cache",
        lambda it: ablated_before_the_prefix(it, it.neurons),
    ),
    "heads before a prefix": (
        r"^blocks\.0\.attn\.hook_z has a hook, and the prefix cache",
        lambda it: ablated_before_the_prefix(it, it.heads),
    ),
    "weights before a prefix": (
        r"^blocks\.0\.mlp has a hook, and the prefix cache",
        lambda it: ablated_before_the_prefix(it, it.weights),
    ),
    "PrefixCache(layer=6)": ("the model has layers 0 to 5$", lambda it: PrefixCache(it.model, 6)),
    "top_neurons(scope='everything')": (
        "^scope is 'everything'; it must be one of 'layer', 'global'$",
        lambda it: top_neurons(it.scores, 0.1, scope="everything"),
    ),
    "top_neurons(rounding='up')": (
        "^rounding is 'up'; it must be one of 'down', 'nearest'$",
        lambda it: top_neurons(it.scores, 0.1, rounding="up"),
    ),
    "top_neurons(ratio='all')": ("^the ratio is 'all'; it must be", lambda it: top_neurons(it.scores, "all")),
    "top_neurons(first_layer=6)": ("layers 0 to 5$", lambda it: top_neurons(it.scores, 0.1, first_layer=6)),
    "top_components(component='head')": (
        "^component is the string 'head'; give one of NEURONS for 'neuron', HEADS for 'head', WEIGHTS for 'weight'$",
        lambda it: top_components(it.scores, 0.1, component="head"),
    ),
    "ComponentSet('head')": ("^component is the string", lambda it: ComponentSet(it.heads.members, "head")),
    "set_from_indices('head')": ("^component is the string", lambda it: set_from_indices(it.model, [(0, 1)], "head")),
    "mean_activations('head')": (
        "^component is the string",
        lambda it: mean_activations(it.model, [it.sequence], "head"),
    ),
    "ablate(empty set, 'off')": (
        "^kind is 'off'; it must be one of 'zero', 'mean', 'scale'$",
        lambda it: entered(ablate(it.model, it.no_neurons, "off")),
    ),
    "ablate(factor=None)": (
        "^factor is None; it must be a number$",
        lambda it: entered(ablate(it.model, it.neurons, "scale", factor=None)),
    ),
    "ablate(mean) over nothing": ("over=sequences", lambda it: entered(ablate(it.model, it.neurons, "mean"))),
    "ablate(mean) over a string": (
        "^the string 'text' was given; give a MemorizedSequence",
        lambda it: entered(ablate(it.model, it.neurons, "mean", over="text")),
    ),
    "ablate(mean) of weights": (
        "^weights have no activations",
        lambda it: entered(ablate(it.model, it.weights, "mean", over=[it.sequence])),
    ),
    "ablate(no sets)": ("^the components are", lambda it: entered(ablate(it.model, []))),
    "neurons and heads in one list": (
        "^sets of neurons and heads cannot be ablated in one list$",
        lambda it: entered(ablate(it.model, [it.neurons, it.heads])),
    ),
    "neurons | heads": ("^sets of different kind or shape do not mix", lambda it: it.neurons | it.heads),
    "heads & weights": ("^sets of different kind or shape do not mix", lambda it: it.heads & it.weights),
    "weights - neurons": ("^sets of different kind or shape do not mix", lambda it: it.weights - it.neurons),
    "overlap of neurons and weights": ("do not mix", lambda it: it.neurons.overlap(it.weights)),
    "recall of heads by neurons": ("do not mix", lambda it: recall(it.heads, it.neurons)),
    "inject(a list)": ("was given; give a MemorizedSequence", lambda it: entered(inject(it.model, [it.sequence]))),
    "inject(component='head')": (
        "^component is 'head'; it must be one of 'neuron', 'weight'$",
        lambda it: entered(inject(it.model, it.sequence, component="head")),
    ),
    "inject(ratio=nan)": ("^the ratio is nan", lambda it: entered(inject(it.model, it.sequence, ratio=math.nan))),
    "inject(keep_norms) of weights": (
        "^keep_norms keeps the lengths of rows",
        lambda it: entered(inject(it.model, it.sequence, keep_norms=True, component="weight")),
    ),
    "load_sequences(split='tset')": ("'tset'|tset", lambda it: load_sequences(it.model, split="tset")),
    "no sequences": ("^no sequence to localize was given$", lambda it: Activations()(it.model, [])),
}

for index in ((6, 0), (0, -1), (0,), (0, 1, 2), 5, (0, 1.0), ("0", "1"), None):
    words = r"^neuron .* does not exist; embedded has neurons of shape \[6, 768\] \[layer, neuron\]$"
    CASES[f"neuron {index!r}"] = (words, lambda it, index=index: Neurons.from_indices(it.model, [index]))


def main() -> None:
    """Print for each case the type and the message of what it raises."""
    things, raised = Things(), {}
    assert NEURONS.shape(things.model) == tuple(things.scores.shape)
    for name, (_, call) in CASES.items():
        try:
            raised[name] = ["nothing", repr(call(things))]
        except Exception as error:
            raised[name] = [type(error).__name__, str(error)]
    print(json.dumps(raised))


if __name__ == "__main__":
    main()
