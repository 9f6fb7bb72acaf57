"""Every localizer against its formula on configurations that users build, or that rarer families have."""

import naive
import pytest
import torch
from tiny import tiny_model, tiny_sequence

from memloc_lens import COMPONENTS, IntegratedGradients, Slimming, ZeroOut, ablate, inject, top_neurons
from memloc_lens.localizers import integrated_gradients, zero_out
from memloc_lens.metrics import free_running, suffix_loss, teacher_forced
from memloc_lens.models import prepare

SEQUENCE = tiny_sequence(length=7)
TRAINING = dict(steps=2, lr=0.05, penalty=2.0)

ROTARY = dict(positional_embedding_type="rotary", rotary_dim=4)
GEMMA_2 = dict(
    normalization_type="RMS", use_normalization_before_and_after=True, gated_mlp=True, n_key_value_heads=1,
    attn_scores_soft_cap=1.5, output_logits_soft_cap=2.0, use_local_attn=True, attn_types=["local", "global"],
    window_size=3, **ROTARY,
)  # fmt: skip
CONFIGURATIONS = {
    "no norm": dict(normalization_type=None),
    "LNPre": dict(normalization_type="LNPre"),
    "RMS": dict(normalization_type="RMS"),
    "RMSPre": dict(normalization_type="RMSPre"),
    "SoLU with a norm": dict(act_fn="solu_ln"),
    "results of heads": dict(use_attn_result=True),
    "split inputs": dict(use_split_qkv_input=True),
    "attention input": dict(use_attn_in=True),
    "MLP input": dict(use_hook_mlp_in=True),
    "parallel": dict(parallel_attn_mlp=True, **ROTARY),
    "part rotary": dict(positional_embedding_type="rotary", rotary_dim=2),
    "rotary pairs": dict(rotary_adjacent_pairs=True, **ROTARY),
    "alibi": dict(positional_embedding_type="alibi"),
    "scaled by layer": dict(scale_attn_by_inverse_layer_idx=True),
    "unscaled": dict(use_attn_scale=False),
    "windows": dict(use_local_attn=True, attn_types=["local", "global"], window_size=2),
    "windows last": dict(use_local_attn=True, attn_types=["global", "local"], window_size=2, **ROTARY),
    "norms of queries and keys": dict(use_qk_norm=True),
    "norms of queries and keys, rotary": dict(use_qk_norm=True, n_key_value_heads=1, **ROTARY),
    "capped attention": dict(attn_scores_soft_cap=0.8),
    "capped logits": dict(output_logits_soft_cap=1.5),
    "Gemma 2": GEMMA_2,
    "Gemma 3": GEMMA_2 | dict(attn_scores_soft_cap=-1.0, output_logits_soft_cap=-1.0, use_qk_norm=True),
    "OLMo 2": dict(original_architecture="Olmo2ForCausalLM", normalization_type="RMS", gated_mlp=True,
                   use_qk_norm=False, **ROTARY),
    "clipped": dict(clip_qkv=0.3),
    "clipped, rotary": dict(clip_qkv=0.3, **ROTARY),
    "logn": dict(use_logn_attn=True, train_seq_length=4, **ROTARY),
    "sinks": dict(use_attention_sinks=True),
    "one layer": dict(n_layers=1),
    "one neuron": dict(d_mlp=1),
    "context as long as the sequence": dict(n_ctx=7),
}  # fmt: skip


@pytest.fixture(params=CONFIGURATIONS)
def model(request):
    return tiny_model(**CONFIGURATIONS[request.param])


def close(scores: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((scores - expected).norm() <= 1e-5 * expected.norm())


def test_exact(model):
    assert close(suffix_loss(model, [SEQUENCE])[0], naive.suffix_loss(model, SEQUENCE).detach())
    expected = model(SEQUENCE.tokens[None])[0, 3:-1].argmax(dim=-1)
    assert torch.equal(teacher_forced(model, [SEQUENCE])[0], expected)
    for component in ("neuron", "head"):
        assert close(ZeroOut(component=component)(model, SEQUENCE), naive.zero_out(model, SEQUENCE, component))
    assert close(IntegratedGradients(steps=2)(model, SEQUENCE), naive.integrated_gradients(model, SEQUENCE, 2))
    for component in COMPONENTS:
        scores = Slimming(**TRAINING, stop_loss=0, component=component)(model, SEQUENCE)
        assert close(scores, naive.slimming(model, SEQUENCE, **TRAINING, component=component))


def test_injection_and_generation(model):
    whole = tiny_sequence(length=7, prompt_len=1)
    with inject(model, SEQUENCE, ratio=1.0, max_steps=3) as injected:
        assert injected.loss == pytest.approx(naive.suffix_loss(model, whole).item())
    with ablate(model, top_neurons(torch.rand(model.cfg.n_layers, model.cfg.d_mlp), ratio=1.0)):
        tokens = SEQUENCE.prompt
        for _ in range(3):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(dim=-1)], dim=1)
        assert torch.equal(free_running(model, [SEQUENCE])[0], tokens[0, 4:])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_faster_pass_is_the_same(name):
    model = tiny_model(**CONFIGURATIONS[name]).requires_grad_(False)

    def logits_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        stream = model(SEQUENCE.tokens[None], stop_at_layer=0).requires_grad_(True)
        logits = model(stream, start_at_layer=0)
        return logits.detach(), torch.autograd.grad(logits.square().sum(), stream)[0]

    logits, gradient = logits_and_gradient()
    prepare(model)
    for ours, expected in zip(logits_and_gradient(), (logits, gradient), strict=True):
        assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        assert torch.allclose(model(SEQUENCE.tokens[None]), logits, atol=1e-12)


@pytest.mark.parametrize("name", ["unscaled", "windows last", "norms of queries and keys, rotary"])
def test_localizers_on_a_faster_pass(name):
    model = tiny_model(**CONFIGURATIONS[name])
    expected = naive.zero_out(model, SEQUENCE), naive.slimming(model, SEQUENCE, **TRAINING, component="neuron")
    prepare(model)
    assert close(ZeroOut()(model, SEQUENCE), expected[0])
    assert close(Slimming(**TRAINING, stop_loss=0)(model, SEQUENCE), expected[1])


@pytest.mark.parametrize(
    "name", ["alibi", "capped attention", "Gemma 2", "OLMo 2", "norms of queries and keys, rotary"]
)
def test_families_have_the_fast_form(name, monkeypatch):
    monkeypatch.setattr(integrated_gradients, "clean_pass", None)
    IntegratedGradients(steps=2)(tiny_model(**CONFIGURATIONS[name]), SEQUENCE)


def test_norms_before_the_last_layer_only(monkeypatch):
    """The closed form of the last layer is used where it holds, and only there."""
    used = []
    original = zero_out._losses_without_last
    monkeypatch.setattr(zero_out, "_losses_without_last", lambda *given: used.append(1) or original(*given))
    for name, expected in (("RMS", True), ("LNPre", False), ("no norm", False), ("Gemma 2", False), ("OLMo 2", False)):
        used.clear()
        ZeroOut()(tiny_model(**CONFIGURATIONS[name]), SEQUENCE)
        assert bool(used) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(attn_only=True, d_mlp=None, act_fn=None), "has attention layers only"),
        (dict(d_vocab_out=20), "has a vocabulary of 31 and predicts one of 20"),
        (dict(positional_embedding_type="shortformer"), "has the position embeddings of shortformer"),
        (dict(attention_dir="bidirectional"), "has bidirectional attention"),
        (dict(num_experts=2, experts_per_token=1, gated_mlp=True, dtype=torch.float32), "has 2 experts a layer"),
    ],
)
def test_what_the_methods_are_not_defined_for(changes, message):
    model = tiny_model(**changes)
    for work in (
        lambda: ZeroOut()(model, SEQUENCE),
        lambda: IntegratedGradients()(model, SEQUENCE),
        lambda: teacher_forced(model, [SEQUENCE]),
        lambda: prepare(model),
    ):
        with pytest.raises(ValueError, match=message):
            work()
