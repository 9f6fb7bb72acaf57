"""A model whose layers are on two pretended GPUs: everything gives what it gives on the CPU."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pretended_gpus import PretendedGPUs, placed
from test_surroundings import SEQUENCES, everything
from tiny import tiny_model, tiny_sequence

from conftest import records_of, some_of
from memloc_lens import (
    COMPONENTS,
    HEADS,
    Activations,
    BalancedSubnet,
    Contrast,
    DropMask,
    Gradient,
    HardConcrete,
    IntegratedGradients,
    IterativeGradient,
    Protect,
    Random,
    Slimming,
    WeightNorm,
    ZeroOut,
    ablate,
    inject,
    smallest_set,
)
from memloc_lens.benchmarks import deletion, injection, roles, specificity
from memloc_lens.erase.baselines import Unlearning, gradient_ascent
from memloc_lens.erase.command import EraseSettings
from memloc_lens.erase.command import run as erase
from memloc_lens.erase.relearning import Relearning
from memloc_lens.erase.ways import zeroed
from memloc_lens.forward import PrefixCache
from memloc_lens.metrics import free_running, row_losses, suffix_loss, suffix_probabilities
from memloc_lens.plots.tokens import token_losses
from memloc_lens.report.command import ReportSettings, write_report

SHAPES = {
    "GPT-2": dict(),
    "Llama": dict(positional_embedding_type="rotary", rotary_dim=4, normalization_type="RMS", gated_mlp=True,
                  n_key_value_heads=1, output_logits_soft_cap=2.0),
    "Gemma": dict(positional_embedding_type="rotary", rotary_dim=4, use_normalization_before_and_after=True,
                  normalization_type="RMS", attn_scores_soft_cap=2.0),
}  # fmt: skip
CONTEXT = [tiny_sequence(seed) for seed in (11, 12, 13)]

METHODS = [
    *(Random(component=name) for name in COMPONENTS),
    *(WeightNorm(component=name) for name in COMPONENTS),
    *(Activations(component=name) for name in COMPONENTS),
    Activations("mean_abs"),
    *(Gradient(component=name, context=CONTEXT) for name in COMPONENTS),
    *(IterativeGradient(rounds=2, max_ratio=0.5, component=name, first_layer=1) for name in COMPONENTS),
    *(Slimming(steps=2, component=name, first_layer=3) for name in COMPONENTS),
    *(HardConcrete(steps=2, component=name, first_layer=1) for name in COMPONENTS),
    ZeroOut(first_layer=1),
    ZeroOut(candidates=0.5, component="head"),
    IntegratedGradients(steps=3),
    DropMask(steps=2, ratio=0.2, context=CONTEXT),
    BalancedSubnet(steps=2, ratio=0.2, context=CONTEXT),
    Protect(Gradient(), CONTEXT, share=0.2),
    Contrast(Activations(), CONTEXT),
]


def same_on_both(gpus: PretendedGPUs, work: Callable, **changes) -> None:
    """Check that some work on a model gives the same tensors on two GPUs as on the CPU."""
    expected = work(tiny_model(**changes))
    model = placed(gpus, tiny_model(**changes))
    with gpus:
        found = work(model)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.double(), other.double(), atol=1e-9)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_everything(gpus, changes):
    same_on_both(gpus, lambda model: everything(model, SEQUENCES), **changes)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{getattr(method, 'component', '')}")
def test_scores(gpus, method):
    def work(model):
        scores = method(model, SEQUENCES)
        assert str(scores.device.type) == torch.device(model.cfg.device).type
        return [scores]

    same_on_both(gpus, work, n_layers=4, positional_embedding_type="rotary", rotary_dim=4)


def smallest(model):
    scores = Gradient()(model, SEQUENCES[1])
    found = smallest_set(model, SEQUENCES[1], scores, until="sampled", limit=0.01)
    assert found is not None
    assert found.components
    return [found.components.members, torch.tensor(found.left.probability, device="cpu")]


def greedily(model):
    with ablate(model, some_of(model, HEADS, 0.5)):
        return free_running(model, SEQUENCES)


def one_set_a_row(model):
    rows = torch.stack([SEQUENCES[0].tokens] * 2)
    found = []
    for component in COMPONENTS.values():
        with ablate(model, [some_of(model, component, 0.5, seed) for seed in (1, 2)], "scale", factor=0.3):
            found.append(row_losses(model, rows))
    return found


def after_cached_layers(model):
    found, rows = [], SEQUENCES[0].tokens[None]
    for layer in (2, 3):
        prefix = PrefixCache(model, layer)
        found += [row_losses(model, rows, prefix=prefix), suffix_probabilities(model, SEQUENCES[0], prefix)]
    return found


def injected_weights(model):
    with inject(model, SEQUENCES[0], ratio=0.3, max_steps=3, component="weight") as injected:
        return [injected.ground_truth.members, *(block.mlp.W_out.detach().clone() for block in model.blocks)]


def shown_tokens(model):
    return [token_losses(model, SEQUENCES[0])]


def erased(model):
    found = []
    for component in COMPONENTS.values():
        with zeroed(model, some_of(model, component, 0.5)):
            found.append(suffix_loss(model, SEQUENCES))
    return found


def trained(model):
    learned = Relearning(lr=0.01, max_steps=3)(model, SEQUENCES[0], [SEQUENCES[1]])
    found = [torch.tensor([point["loss"] for point in learned["curve"]], device="cpu")]
    with gradient_ascent(model, SEQUENCES[:1], CONTEXT, Unlearning(max_steps=2, until="sampled", limit=1e-9)):
        return [*found, suffix_loss(model, SEQUENCES)]


def seen_by_roles(model):
    sizes = roles._sizes(model, SEQUENCES)
    return [sizes, *roles._of_target(model, SEQUENCES[0], sizes, roles._promoted(model))]


WORK = (smallest, greedily, one_set_a_row, after_cached_layers, injected_weights, shown_tokens, erased, trained,
        seen_by_roles)  # fmt: skip


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_what_else_runs_a_model(gpus, work):
    same_on_both(gpus, work, n_layers=4)


def test_the_plain_ways(gpus):
    """A hook of the user's takes the fast forms away."""

    def work(model):
        model.hook_dict["blocks.1.hook_mlp_out"].add_hook(lambda activations, hook: activations * 2)
        model.hook_dict["ln_final.hook_normalized"].add_hook(lambda activations, hook: activations * 2)
        return [ZeroOut()(model, SEQUENCES[0]), IntegratedGradients(steps=2)(model, SEQUENCES[0]), *trained(model)]

    same_on_both(gpus, work, n_layers=3)


def records_like(found: list[dict], expected: list[dict]) -> bool:
    return len(found) == len(expected) and all(
        one.keys() == other.keys() and all(_like(one[name], other[name]) for name in one)
        for one, other in zip(found, expected, strict=True)
    )


def _like(one, other) -> bool:
    return one == pytest.approx(other, abs=1e-6) if isinstance(one, int | float | list) else one == other


def test_runs(gpus, small_del, small_inj, tmp_path):
    methods = ("zero-out", IterativeGradient(rounds=2), Slimming(steps=2))
    for benchmark, settings in ((deletion, small_del), (injection, small_inj)):
        settings = replace(settings, dtype="float64", methods=methods, limit=1, ratios=(0.2,), out=tmp_path / "cpu")
        benchmark.run(settings)
        on_gpus = replace(settings, out=tmp_path / "gpus")
        with gpus:
            benchmark.run(replace(on_gpus, device="cuda", n_devices=2))
        assert records_like(records_of(on_gpus.out), records_of(settings.out))
        for path in (settings.out, on_gpus.out):
            path.rename(tmp_path / f"{path.name}-{benchmark.__name__}")


def test_analyses_of_a_run(gpus, whole_del, tmp_path):
    where = dict(device="cuda", n_devices=2)
    with gpus:
        found = specificity.analyse(specificity.SpecificitySettings(whole_del.out, **where))
        page = write_report(ReportSettings((whole_del.out,), out=tmp_path / "report.html", **where))
    assert page.stat().st_size > 10**4
    assert found == specificity.analyse(specificity.SpecificitySettings(whole_del.out, device="cpu"))


def test_an_erased_checkpoint(gpus, recited, tmp_path):
    settings = EraseSettings(
        model=str(recited / "model"), data=recited / "data.jsonl", limit=1, max_neg_loss=100, first_layer=0,
        method="gradient", component="neuron", until="greedy",
    )  # fmt: skip
    with gpus:
        found = erase(replace(settings, device="cuda", n_devices=2, out=tmp_path / "gpus"))
    expected = erase(replace(settings, device="cpu", out=tmp_path / "cpu"))
    assert found.succeeded
    assert found.components == expected.components
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("gpus", "cpu")]
    assert written[0] == written[1]
