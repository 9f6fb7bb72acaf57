from pathlib import Path

import pytest
import torch
from transformer_lens import HookedTransformer
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedModel as Original

from memloc_lens import MemorizedSequence, load_model

VOCAB, CONTEXT, PROMPT = 97, 40, 6
ARCHITECTURES = ("gpt2", "neox", "llama", "llama-tied")


def make_original(architecture: str) -> Original:
    """A small random model with weights large enough that every part of it matters."""
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.2)
    if architecture == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2, n_positions=CONTEXT, n_ctx=CONTEXT
        )
        model = GPT2LMHeadModel(config)
    elif architecture == "neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, intermediate_size=48, max_position_embeddings=CONTEXT))
    else:
        tied = architecture == "llama-tied"
        config = LlamaConfig(
            **shape,
            intermediate_size=48,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=tied,
        )
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.fixture(scope="session", params=ARCHITECTURES)
def folder(request, tmp_path_factory) -> Path:
    """A folder in transformers format without a tokenizer, one for each architecture."""
    path = tmp_path_factory.mktemp(request.param)
    make_original(request.param).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def any_model(folder) -> HookedTransformer:
    """A model of each architecture, in float64 so that exact methods can be compared closely."""
    return load_model(folder, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory) -> HookedTransformer:
    path = tmp_path_factory.mktemp("plain-gpt2")
    make_original("gpt2").save_pretrained(path)
    return load_model(path, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="session")
def embedded() -> HookedTransformer:
    return load_model(device="cpu")


def random_sequence(seed: int = 0, length: int = 14, prompt_len: int = PROMPT) -> MemorizedSequence:
    tokens = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))
    return MemorizedSequence(tokens, prompt_len, id=f"random-{seed}")


@pytest.fixture
def sequence() -> MemorizedSequence:
    return random_sequence()


def state_of(model: HookedTransformer) -> dict:
    """Everything of a model that a localizer or an ablation must leave as it was."""
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": sum(
            len(point.fwd_hooks) + len(point.bwd_hooks) + len(point._forward_hooks)
            for point in model.hook_dict.values()
        ),
        "rng": torch.get_rng_state(),
    }


def assert_same_state(before: dict, after: dict) -> None:
    assert all(torch.equal(before["weights"][name], after["weights"][name]) for name in before["weights"])
    assert torch.equal(before["rng"], after["rng"])
    for one, other in zip(before["grads"], after["grads"], strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    for part in ("requires_grad", "training", "hooks"):
        assert before[part] == after[part]
