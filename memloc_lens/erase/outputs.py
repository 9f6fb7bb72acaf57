"""Where a checkpoint keeps the matrices that write what neurons and heads hold, by architecture of transformers."""

import re
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Bool
from torch import Tensor

from memloc_lens.checks import reason
from memloc_lens.components import HEADS, WEIGHTS, Component, ComponentSet

LAYER = re.compile(r"(?:^|\.)(?:h|layers)\.(\d+)\.(.+)\.weight$")
"""The name of a weight in a layer, with any prefix: checkpoints of one architecture differ in it."""


@dataclass(frozen=True)
class Outputs:
    """The output matrices of an architecture.

    Args:
        mlp: module of a layer that holds the matrix after the neurons.
        attention: module of a layer that holds the matrix after the heads.
        by_row: whether a row is an input, as in GPT-2's `Conv1D`; of a `Linear`, a column is.
    """

    mlp: str
    attention: str
    by_row: bool = False

    def layer_of(self, name: str, component: Component) -> int | None:
        """Return the layer of a tensor that holds components of a kind, None for any other tensor.

        Example:
            >>> OUTPUTS["LlamaForCausalLM"].layer_of("model.layers.3.mlp.down_proj.weight", NEURONS)
            3
        """
        found = LAYER.search(name)
        module = self.attention if component is HEADS else self.mlp
        return int(found[1]) if found and found[2] == module else None

    def members(self, components: ComponentSet, layer: int, shape: tuple[int, ...]) -> Bool[Tensor, "out in"]:
        """Return which weights of a layer's output matrix belong to a set, in the orientation of the checkpoint.

        Args:
            components: of any kind.
            layer: index of the layer.
            shape: of the matrix in the checkpoint.

        Raises:
            ValueError: if the set is of a model of another shape.

        Example:
            >>> members = OUTPUTS["LlamaForCausalLM"].members(Neurons.from_indices(model, [(1, 5)]), 1, (192, 768))
            >>> members.shape, int(members.sum())
            (torch.Size([192, 768]), 192)
        """
        inputs, outputs = shape if self.by_row else shape[::-1]
        chosen = components.layer(layer).cpu()
        width = inputs // len(chosen)
        if width * len(chosen) != inputs or (components.component is not HEADS and width != 1):
            raise ValueError(f"{components!r} of shape {list(components.shape)} do not fit a matrix of {inputs} inputs")
        rows = chosen if components.component is WEIGHTS else chosen.repeat_interleave(width)[:, None]
        if rows.shape[1] not in (1, outputs):
            raise ValueError(f"{components!r} of shape {list(components.shape)} do not fit {outputs} outputs")
        rows = rows.expand(inputs, outputs)
        return rows if self.by_row else rows.T


_LLAMA = Outputs("mlp.down_proj", "self_attn.o_proj")

OUTPUTS: dict[str, Outputs] = {
    "GPT2LMHeadModel": Outputs("mlp.c_proj", "attn.c_proj", by_row=True),
    "GPTNeoForCausalLM": Outputs("mlp.c_proj", "attn.attention.out_proj"),
    "GPTJForCausalLM": Outputs("mlp.fc_out", "attn.out_proj"),
    "GPTNeoXForCausalLM": Outputs("mlp.dense_4h_to_h", "attention.dense"),
    "OPTForCausalLM": Outputs("fc2", "self_attn.out_proj"),
    "BloomForCausalLM": Outputs("mlp.dense_4h_to_h", "self_attention.dense"),
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "GemmaForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _LLAMA,
    "Gemma3ForCausalLM": _LLAMA,
    "Gemma3ForConditionalGeneration": _LLAMA,
    "PhiForCausalLM": Outputs("mlp.fc2", "self_attn.dense"),
    "Phi3ForCausalLM": _LLAMA,
    "OlmoForCausalLM": _LLAMA,
    "Olmo2ForCausalLM": _LLAMA,
    "Olmo3ForCausalLM": _LLAMA,
}
"""The output matrices by the name of transformers' class; every family that loads has a line."""


def outputs_of(folder: Path) -> Outputs:
    """Return the output matrices of a checkpoint in transformers format.

    Raises:
        ValueError: if its configuration cannot be read, or is not of an architecture in the table.

    Example:
        >>> from memloc_lens.models import EMBEDDED
        >>> outputs_of(EMBEDDED)
        Outputs(mlp='mlp.c_proj', attention='attn.c_proj', by_row=True)
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a damaged file raises whatever its reader came upon
        raise ValueError(f"the configuration of {folder} cannot be read: {reason(error)}") from error
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    name = model_class.__name__ if model_class else config.model_type
    if name not in OUTPUTS:
        raise ValueError(f"{folder} holds {name}; output matrices are known of {', '.join(OUTPUTS)}")
    return OUTPUTS[name]
