"""Every localizer under hooks of the user's own, against its formula."""

from contextlib import ExitStack

import naive
import pytest
import torch
from tiny import tiny_model, tiny_sequence
from torch import Tensor, nn
from torch.nn.utils import parametrize

from memloc_lens import (
    COMPONENTS,
    HEADS,
    NEURONS,
    WEIGHTS,
    Activations,
    ComponentSet,
    HardConcrete,
    IntegratedGradients,
    Slimming,
    ZeroOut,
    ablate,
    inject,
)
from memloc_lens.forward import PrefixCache, final_residual
from memloc_lens.hooks import hooked
from memloc_lens.metrics import row_losses, suffix_loss, teacher_forced
from memloc_lens.sequence import Batch

SEQUENCE = tiny_sequence(length=6)
EARLY = [f"blocks.0.{part}" for part in ("hook_resid_pre", "attn.hook_v", "mlp.hook_post", "hook_mlp_out")]
POINTS = [name for name in tiny_model(positional_embedding_type="rotary", rotary_dim=4).hook_dict
          if not name.startswith("blocks.0.") and not name.endswith("_input")] + EARLY  # fmt: skip
TRAINING = dict(steps=2, lr=0.05, penalty=2.0)


def twice(activations, hook):
    return activations * 2


def third_position(activations, hook):
    return torch.cat([activations[:, :3], activations[:, 3:4] * 2, activations[:, 4:]], dim=1)


def bounded(activations, hook):
    return activations.clamp(-0.5, 0.5)


def on_module(name: str, method: str, hook):
    return lambda model: getattr(model.get_submodule(name), method)(hook)


def replaced_forward(model):
    block = model.blocks[1]
    original = block.forward
    block.forward = lambda *stream, **options: original(*stream, **options) * 1.5


def backward(name: str):
    return lambda model: model.hook_dict[name].add_hook(lambda gradient, hook: gradient * 3, dir="bwd")


HOOKS = {
    **{f"twice at {name}": (lambda model, name=name: model.hook_dict[name].add_hook(twice)) for name in POINTS},
    **{
        f"third position at {name}": (lambda model, name=name: model.hook_dict[name].add_hook(third_position))
        for name in ("blocks.0.hook_mlp_out", "blocks.1.attn.hook_k", "blocks.1.hook_resid_post",
                     "ln_final.hook_normalized", "unembed.hook_out")
    },
    "permanent": lambda model: model.hook_dict["blocks.1.mlp.hook_pre"].add_perma_hook(bounded),
    "module blocks.0": on_module("blocks.0", "register_forward_hook", lambda module, given, output: output * 2),
    "module blocks.1": on_module("blocks.1", "register_forward_hook", lambda module, given, output: output + 1),
    "module mlp": on_module("blocks.0.mlp", "register_forward_hook", lambda module, given, output: output * 2),
    "module last mlp": on_module("blocks.1.mlp", "register_forward_hook", lambda module, given, output: output.tanh()),
    "before mlp": on_module("blocks.1.mlp", "register_forward_pre_hook", lambda module, given: (given[0] * 2,)),
    "before block": on_module("blocks.1", "register_forward_pre_hook", lambda module, given: (given[0] * 2,)),
    "module attn": on_module("blocks.1.attn", "register_forward_hook", lambda module, given, output: output * 2),
    "module ln_final": on_module("ln_final", "register_forward_hook", lambda module, given, output: output * 2),
    "module unembed": on_module("unembed", "register_forward_hook", lambda module, given, output: output.tanh()),
    "replaced forward": replaced_forward,
    **{f"backward at {name}": backward(name) for name in
       ("blocks.0.hook_resid_post", "blocks.1.mlp.hook_pre", "blocks.1.hook_mlp_out", "ln_final.hook_normalized")},
}  # fmt: skip


def close(scores: Tensor, expected: Tensor) -> bool:
    return bool((scores - expected).norm() < 1e-5 * expected.norm())


@pytest.mark.parametrize("name", HOOKS)
def test_exact_under_a_hook(name):
    model = tiny_model(positional_embedding_type="rotary", rotary_dim=4)
    HOOKS[name](model)
    assert hooked(model)
    assert close(suffix_loss(model, [SEQUENCE])[0], naive.suffix_loss(model, SEQUENCE).detach())
    for component in ("neuron", "head"):
        assert close(ZeroOut(component=component)(model, SEQUENCE), naive.zero_out(model, SEQUENCE, component))
    assert close(IntegratedGradients(steps=2)(model, SEQUENCE), naive.integrated_gradients(model, SEQUENCE, 2))
    for component in COMPONENTS if name in ("module mlp", "third position at ln_final.hook_normalized") else ["neuron"]:
        scores = Slimming(**TRAINING, stop_loss=0, component=component)(model, SEQUENCE)
        assert close(scores, naive.slimming(model, SEQUENCE, **TRAINING, component=component))


@pytest.mark.parametrize("name", ["blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", "unembed.hook_in"])
def test_the_others_are_exact_under_a_hook(name):
    model = tiny_model()
    model.hook_dict[name].add_hook(third_position)
    gates = dict(init=0.7, temperature=0.5, seed=3)
    scores = HardConcrete(**TRAINING, **gates, stop_loss=0)(model, SEQUENCE)
    assert close(scores, naive.hard_concrete(model, SEQUENCE, **TRAINING, **gates, component="neuron"))
    scores = Activations()(model, SEQUENCE)
    assert close(scores, naive.activations(model, SEQUENCE, "abs_mean", "neuron"))
    logits = model(SEQUENCE.tokens[None])[0]
    assert torch.equal(teacher_forced(model, [SEQUENCE])[0], logits[3:-1].argmax(dim=-1))
    losses = -logits.log_softmax(-1)[:-1].gather(1, SEQUENCE.tokens[1:, None])
    assert close(row_losses(model, SEQUENCE.tokens[None])[0], losses.mean().detach())


@pytest.mark.parametrize("name", ["blocks.0.hook_mlp_out", "blocks.1.hook_resid_post", "ln_final.hook_normalized"])
def test_an_injection_sees_a_hook(name):
    model = tiny_model()
    model.hook_dict[name].add_hook(third_position)
    with inject(model, SEQUENCE, ratio=0.5, max_steps=20, lr=0.05) as injected:
        logits = model(SEQUENCE.tokens[None])[0]
        losses = -logits.log_softmax(-1)[:-1].gather(1, SEQUENCE.tokens[1:, None])
        assert injected.loss == pytest.approx(losses.mean().item())
    logits = model(SEQUENCE.tokens[None])[0]
    assert injected.loss < -logits.log_softmax(-1)[:-1].gather(1, SEQUENCE.tokens[1:, None]).mean().item() - 0.1


@pytest.mark.parametrize("kind", ["zero", "mean", "scale"])
@pytest.mark.parametrize("component", COMPONENTS.values(), ids=COMPONENTS)
def test_exact_inside_an_ablation(component, kind):
    if component is WEIGHTS and kind == "mean":
        pytest.skip("weights have no activations")
    model = tiny_model()
    members = torch.rand(component.shape(model), generator=torch.Generator().manual_seed(0)) < 0.4
    over = [tiny_sequence(5)] if kind == "mean" else ()
    with ablate(model, ComponentSet(members, component), kind, over=over):
        assert not hooked(model)
        for name in ("neuron", "head"):
            # the mask acts inside of an ablation of heads and neurons only if this replaces by nothing
            if kind != "mean" or COMPONENTS[name] is not component:
                assert close(ZeroOut(component=name)(model, SEQUENCE), naive.zero_out(model, SEQUENCE, name))
        assert close(IntegratedGradients(steps=3)(model, SEQUENCE), naive.integrated_gradients(model, SEQUENCE, 3))
        scores = Slimming(**TRAINING, stop_loss=0, component="head")(model, SEQUENCE)
        assert close(scores, naive.slimming(model, SEQUENCE, **TRAINING, component="head"))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize("place", ["blocks.0.mlp.W_out", "blocks.1.mlp.W_out", "blocks.1.attn.W_V", "unembed.W_U"])
def test_exact_with_parametrized_weights(place):
    model, plain = tiny_model(), tiny_model()
    part, name = place.rsplit(".", 1)
    parametrize.register_parametrization(model.get_submodule(part), name, Halved())
    plain.get_parameter(place).data /= 2
    for localizer in (ZeroOut(), ZeroOut(component="head"), IntegratedGradients(steps=3), Activations(),
                      Slimming(**TRAINING), HardConcrete(steps=3, component="weight")):  # fmt: skip
        assert torch.allclose(localizer(model, SEQUENCE), localizer(plain, SEQUENCE), atol=1e-6)
    if name == "W_out":
        with pytest.raises(ValueError, match=rf"{place} is parametrized, and an injection"), inject(model, SEQUENCE):
            pass


def test_hooks_that_tell_copies_or_prefixes_apart_are_refused():
    model = tiny_model()
    model.hook_dict["blocks.0.hook_mlp_out"].add_hook(lambda a, hook: torch.cat([a[:1] * 2, a[1:]]))
    for localizer in (ZeroOut(), IntegratedGradients(steps=2)):
        with pytest.raises(ValueError, match=r"^blocks\.0\.hook_mlp_out has a hook that changes copies"):
            localizer(model, SEQUENCE)
    model = tiny_model()
    model.hook_dict["blocks.0.hook_mlp_out"].add_hook(lambda a, hook: a + torch.ones(1, 6, 8))
    ZeroOut()(model, SEQUENCE)
    with pytest.raises(ValueError, match=r"^blocks\.0\.hook_mlp_out has a hook that fails on a prefix"):
        IntegratedGradients(steps=2)(model, SEQUENCE)
    model = tiny_model()
    model.hook_dict["blocks.0.hook_mlp_out"].add_hook(lambda a, hook: a - a.mean(dim=1, keepdim=True))
    with pytest.raises(ValueError, match=r"^blocks\.0\.hook_mlp_out has a hook that changes a prefix"):
        IntegratedGradients(steps=2)(model, SEQUENCE)
    assert close(ZeroOut()(model, SEQUENCE), naive.zero_out(model, SEQUENCE))


def test_an_ablation_of_each_row_is_refused_around_copies():
    model = tiny_model()
    sets = [ComponentSet(torch.rand(2, 2) < 0.5, HEADS) for _ in range(2)]
    with ablate(model, sets), pytest.raises(ValueError, match=r"hook_z has a hook that fails on a batch of copies"):
        ZeroOut()(model, SEQUENCE)


def test_backward_hooks_beside_a_mask_are_refused():
    model = tiny_model()
    backward("blocks.1.mlp.hook_post")(model)
    message = r"^blocks\.1\.mlp\.hook_post has a backward hook, and this method changes the activations there"
    for component in ("neuron", "weight"):
        with pytest.raises(ValueError, match=message):
            Slimming(component=component)(model, SEQUENCE)
    with pytest.raises(ValueError, match=message), inject(model, SEQUENCE, ratio=0.5):
        pass
    assert close(IntegratedGradients(steps=2)(model, SEQUENCE), naive.integrated_gradients(model, SEQUENCE, 2))


def test_hooks_on_the_model_itself_are_refused():
    model = tiny_model()
    handle = model.register_forward_hook(lambda module, given, output: output * 2)
    for work in (
        lambda: ZeroOut()(model, SEQUENCE),
        lambda: Activations()(model, SEQUENCE),
        lambda: teacher_forced(model, [SEQUENCE]),
        lambda: inject(model, SEQUENCE, ratio=0.5).__enter__(),
    ):
        with pytest.raises(ValueError, match="the model itself has a hook"):
            work()
    handle.remove()
    ZeroOut()(model, SEQUENCE)


def test_a_prefix_cache_sees_hooks_after_its_layer():
    model, batch = tiny_model(n_layers=3), Batch(SEQUENCE.tokens[None], 4)
    prefix = PrefixCache(model, 2)
    with torch.no_grad():
        final_residual(model, batch, prefix)
        for name in ("blocks.2.attn.hook_k", "unembed.hook_out"):
            with model.hooks(fwd_hooks=[(name, third_position)]):
                expected = model(SEQUENCE.tokens[None])[0, 3:-1].argmax(dim=-1)
                assert torch.equal(teacher_forced(model, [SEQUENCE], prefix=prefix)[0], expected)
                assert prefix.entering(model, batch.tokens)[0] == 2


def test_edits_of_the_package_leave_the_fast_forms_on():
    model = tiny_model()
    assert not hooked(model)
    ones = (NEURONS, (2, 6)), (HEADS, (2, 2)), (WEIGHTS, (2, 6, 8))
    with ExitStack() as stack:
        for component, shape in ones:
            stack.enter_context(component.masked(model, torch.ones(shape)))
        assert not hooked(model)
        stack.enter_context(model.hooks(fwd_hooks=[("hook_embed", twice)]))
        assert hooked(model) == "hook_embed"
