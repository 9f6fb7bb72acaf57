import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pretended_gpus import PretendedGPUs, pretended
from transformer_lens.hook_points import HookPoint
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedModel as Original

from memloc_lens import (
    COMPONENTS,
    NEURONS,
    ComponentSet,
    Gradient,
    HardConcrete,
    IntegratedGradients,
    IterativeGradient,
    MemorizedSequence,
    Neurons,
    Slimming,
    erase_sequences,
    load_model,
    load_sequences,
)
from memloc_lens.benchmarks import deletion, injection
from memloc_lens.benchmarks.deletion import DeletionSettings
from memloc_lens.benchmarks.injection import InjectionSettings
from memloc_lens.components import Component
from memloc_lens.erase import Budget, Spared
from memloc_lens.erase.audit import audit, write_audit
from memloc_lens.erase.relearning import Relearning
from memloc_lens.library_types import HookedModel
from memloc_lens.runs.folder import RunFolder

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # where a plugin has imported torch before OMP_NUM_THREADS was set

VOCAB, CONTEXT, PROMPT = 97, 40, 6
ARCHITECTURES = ("gpt2", "neox", "llama", "llama-tied")
EACH_COMPONENT = pytest.mark.parametrize("component", COMPONENTS.values(), ids=COMPONENTS)


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
def architecture(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def folder(architecture, tmp_path_factory) -> Path:
    """A folder in transformers format without a tokenizer, one for each architecture."""
    path = tmp_path_factory.mktemp(architecture)
    make_original(architecture).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def any_model(folder) -> HookedModel:
    """A model of each architecture, in float64 so that exact methods can be compared closely."""
    return load_model(folder, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory) -> HookedModel:
    path = tmp_path_factory.mktemp("plain-gpt2")
    make_original("gpt2").save_pretrained(path)
    return load_model(path, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="session")
def embedded() -> HookedModel:
    return load_model(device="cpu")


@pytest.fixture
def gpus(monkeypatch) -> PretendedGPUs:
    """Two GPUs that are pretended while it is open."""
    return pretended(monkeypatch, 2)


def random_sequence(seed: int = 0, length: int = 14, prompt_len: int = PROMPT) -> MemorizedSequence:
    tokens = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))
    return MemorizedSequence(tokens, prompt_len, id=f"random-{seed}")


@pytest.fixture
def sequence() -> MemorizedSequence:
    return random_sequence()


def some_of(model: HookedModel, component: Component = NEURONS, share: float = 0.3, seed: int = 0) -> ComponentSet:
    """Each component of the model with a probability of `share`."""
    members = torch.rand(component.shape(model), generator=torch.Generator().manual_seed(seed)) < share
    return Neurons(members) if component is NEURONS else ComponentSet(members, component)


def state_of(model: HookedModel) -> dict:
    """Everything of a model that a localizer or an ablation must leave as it was."""
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [
            (name, len(hooks))
            for name, module in model.named_modules()
            for hooks in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                *((module.fwd_hooks, module.bwd_hooks) if isinstance(module, HookPoint) else ()),
            )
        ],
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


def write_lines(path: Path, rows: Iterable[object]) -> Path:
    """Write a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def records_of(run: Path) -> list[dict]:
    """The records of a run folder, without the seconds that they took."""
    lines = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("_seconds")} for line in lines]


def keys_of(records: Iterable[dict]) -> list[tuple]:
    """What identifies each record."""
    return [(record["sequence"], record["method"], record["ratio"]) for record in records]


@pytest.fixture(scope="session")
def recited(tmp_path_factory) -> Path:
    """A folder with a small random `model` without a tokenizer, and sequences in `data.jsonl`."""
    return make_recited(tmp_path_factory.mktemp("recited"))


def make_recited(path: Path) -> Path:
    """Write a small random `model`, and eight sequences: it recites six, greedily, to their ends; two are controls."""
    original = make_original("gpt2")
    original.save_pretrained(path / "model")
    tokens = torch.randint(VOCAB, (8, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for position in range(PROMPT, 14):
            tokens[:6, position] = original(tokens[:6, :position]).logits[:, -1].argmax(dim=-1)
    rows = [
        {"tokens": row, "prompt_len": PROMPT, "id": f"s{index}", "category": [f"c{index % 2}"]}
        | ({} if index < 6 else {"split": "control"})
        for index, row in enumerate(tokens.tolist())
    ]
    write_lines(path / "data.jsonl", rows)
    return path


@pytest.fixture(scope="session")
def wide(tmp_path_factory) -> Path:
    """A random model of two layers of 1000 neurons and 10 heads, so that the paper's ratios take some."""
    torch.manual_seed(0)
    shape = dict(n_embd=40, n_layer=2, n_head=10, n_inner=1000, n_positions=CONTEXT, n_ctx=CONTEXT)
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **shape)).save_pretrained(path := tmp_path_factory.mktemp("wide"))
    return path


QUICK = (
    HardConcrete(steps=5),
    Slimming(steps=5),
    "zero-out",
    IntegratedGradients(steps=2),
    "activations",
    "gradient",
    IterativeGradient(rounds=2),
    "weight-norm",
    "random",
)
"""All methods of the package, quick."""


@pytest.fixture(scope="session")
def small_del(recited) -> DeletionSettings:
    """Settings of a DEL run of a few seconds: three targets in batches of two, five negatives, two controls."""
    return DeletionSettings(
        model=str(recited / "model"),
        data=recited / "data.jsonl",
        ratios=(0.1, 0.5),
        limit=3,
        negatives=0,
        batch=2,
        device="cpu",
        methods=QUICK,
    )


@pytest.fixture(scope="session")
def small_inj(recited) -> InjectionSettings:
    """Settings of an INJ run of a few seconds: two texts, which a fifth of the neurons can hold and 1% cannot."""
    return InjectionSettings(
        model=str(recited / "model"),
        data=recited / "data.jsonl",
        ratios=(0.2, 0.01),
        limit=2,
        lr=0.05,
        target_loss=1.0,
        max_steps=20,
        device="cpu",
        methods=QUICK,
    )


@pytest.fixture(scope="session")
def whole_del(small_del, tmp_path_factory) -> DeletionSettings:
    """The settings of `small_del`, and in their folder the finished run."""
    settings = replace(small_del, out=tmp_path_factory.mktemp("del") / "whole")
    deletion.run(settings)
    return settings


@pytest.fixture(scope="session")
def whole_inj(small_inj, tmp_path_factory) -> InjectionSettings:
    """The settings of `small_inj`, and in their folder the finished run."""
    settings = replace(small_inj, out=tmp_path_factory.mktemp("inj") / "whole")
    injection.run(settings)
    return settings


HOSTILE_ID = "</script><script>window.broken = 1</script>\u202e|`$x_1$`"


@pytest.fixture(scope="session")
def audited(recited, tmp_path_factory) -> Path:
    """A checkpoint that two sequences were erased from, with its audit; the id of the first is hostile."""
    source, out = recited / "model", tmp_path_factory.mktemp("audited") / "<i>erased"
    model = load_model(source, device="cpu")
    first, *others = load_sequences(model, recited / "data.jsonl")
    targets = [MemorizedSequence(first.tokens, first.prompt_len, HOSTILE_ID, first.category), others.pop(0)]
    spared = Spared(others=others)
    erase_sequences(
        model, targets, Gradient(), spared=spared, budget=Budget(max_neg_loss=100), component="neuron", source=source,
        out=out,
    )  # fmt: skip
    controls = load_sequences(model, recited / "data.jsonl", split="control")
    text = torch.randint(VOCAB, (3, 12), generator=torch.Generator().manual_seed(5))
    relearning = Relearning(lr=0.003, max_steps=5, every=2)
    erased = load_model(out, device="cpu")
    write_audit(out, audit(model, erased, targets, others, controls, text, retrained=model, relearning=relearning))
    return out


class Killed(Exception):
    """Stands for the death of a process."""


@pytest.fixture
def dies_after(monkeypatch) -> Callable[[int], None]:
    """A function that lets runs die once they have written so many records; 0: no more."""
    append = RunFolder.append

    def arm(count: int) -> None:
        def append_and_die(self, record):
            append(self, record)
            if len(self.records) == count:
                raise Killed

        monkeypatch.setattr(RunFolder, "append", append_and_die if count else append)

    return arm


@pytest.fixture
def module(tmp_path, monkeypatch) -> Iterator[Callable[[str, str], None]]:
    """A function that writes a module of the user's own into the folder that commands are run in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)

    def write(name: str, content: str) -> None:
        (tmp_path / f"{name}.py").write_text(content)
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - known:
        if (tmp_path / f"{name}.py").exists():
            del sys.modules[name]
