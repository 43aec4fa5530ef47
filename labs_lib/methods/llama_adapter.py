"""LLaMA-Adapter from scratch: a few learned prompts in the top layers, attended to through a gate that starts at zero.

Not a bottleneck adapter, and not prefix tuning either: the prompts have a softmax of their own, whose result is added
to what the frozen attention gives, times the gate. PEFT calls the method AdaptionPrompt; names on disk and the order of
operations are PEFT's: outputs and gradients agree bit for bit.

Source: Zhang et al. 2023, "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention",
arXiv:2303.16199, section 3. There the gate has one number per head, in PEFT and here one per layer.
"""

import torch
from torch import nn

from labs_lib.methods.modules import replace

MODELS = ("llama", "mistral", "qwen2")  # whose queries are nothing but q_proj and a rotation


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions, as Llama has them: x (batch, heads, length, head); cos and sin (batch, length, head)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def zero_gated_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, gate: torch.Tensor
) -> torch.Tensor:
    """What the prompts add to an attention layer, before its output projection: gate * softmax(q k / sqrt(head)) v.

    queries (batch, heads, length, head); keys and values (1, key heads, prompts, head), shared by the batch; gate (1,).
    Returns (batch, length, heads * head). A gate of zero adds exactly nothing.
    Source: Zhang et al. 2023, section 3.2.

    Steps:
    1. Keys and values for every sequence, repeat on dim 0, and for every head: where several share a key head (GQA),
       repeat_interleave on dim 1.
    2. Scores: queries times transposed keys, over the square root of the head's size.
    3. Weights: softmax over the prompts alone, in float32, not together with the text; then times the gate.
    4. The weighted sum of the values; heads back side by side.
    """
    shared = queries.shape[1] // keys.shape[1]
    keys, values = (
        each.repeat(len(queries), 1, 1, 1).repeat_interleave(shared, dim=1) for each in (keys, values)
    )
    scores = queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5
    weights = gate * scores.softmax(dim=-1, dtype=torch.float32).to(queries.dtype)
    return (weights.to(values.dtype) @ values).transpose(1, 2).flatten(2)


class PromptedAttention(nn.Module):
    """A frozen attention layer whose tokens also attend to `prompts` learned vectors, through a gate.

    Stands in for transformers' LlamaAttention. Two things train: adaption_prompt (1, prompts, width), which lies
    where the text's hidden states lie, and adaption_gate (1,).
    Source: Zhang et al. 2023, sections 3.1 and 3.2; standard normal prompts as in the authors' code and PEFT.

    Steps:
    1. __init__: freeze `base`; the prompts are standard normal numbers from `generator`, the gate is zero.
    2. forward: run `base`. Then once more, for the prompts: queries from the hidden states, rotated by the text's
       positions; keys and values from the prompts, through the same frozen projections, without positions.
    3. Send zero_gated_attention through o_proj, without its bias, which `base` has already added, and add it.
    """

    def __init__(self, base: nn.Module, prompts: int, generator=None) -> None:
        super().__init__()
        weight = base.q_proj.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)  # never train in half precision
        start = torch.randn(1, prompts, base.q_proj.in_features, generator=generator)
        self.adaption_prompt = nn.Parameter(start.to(weight.device, dtype))
        self.adaption_gate = nn.Parameter(torch.zeros(1, device=weight.device, dtype=dtype))
        self.base = base.requires_grad_(False)

    def forward(self, hidden_states, position_embeddings, **kwargs):
        base = self.base
        output, *rest = base(hidden_states=hidden_states, position_embeddings=position_embeddings, **kwargs)
        prompt = self.adaption_prompt.to(hidden_states.dtype)
        heads = [
            projected.unflatten(-1, (-1, base.head_dim)).transpose(1, 2)
            for projected in (base.q_proj(hidden_states), base.k_proj(prompt), base.v_proj(prompt))
        ]
        queries = rotate(heads[0], *position_embeddings)
        added = base.o_proj(
            zero_gated_attention(queries, heads[1], heads[2], self.adaption_gate).to(output.dtype)
        )
        if base.o_proj.bias is not None:
            added = added - base.o_proj.bias
        return output + added, *rest


def count_llama_adapter(width: int, prompts: int, layers: int) -> int:
    """How many numbers LLaMA-Adapter trains: in each layer the prompts, each as wide as the model, and one gate."""
    return layers * (prompts * width + 1)


def inject_llama_adapter(
    model: nn.Module,
    prompts: int = 10,
    layers: int = 30,
    generator: torch.Generator | None = None,
    kind: type[nn.Module] = PromptedAttention,
) -> nn.Module:
    """Freeze `model` and put a PromptedAttention (or your own `kind`) into its top `layers` layers; returns the model.

    The defaults are the paper's, for Llama's 32 layers. A model with fewer layers than asked for is an error, as in
    PEFT; whatever is wrong, the model stays as it was.

    Steps:
    1. Take the last `layers` of attention_layers(model), and make a `kind`(attention, prompts, generator) for each.
    2. Freeze every parameter of the model.
    3. Put each wrapper in its layer's place: setattr on the parent, model.get_submodule(name of the parent).
    """
    if prompted_layers(model):
        raise ValueError("This model already carries a LLaMA-Adapter: call remove_llama_adapter first.")
    attentions = attention_layers(model)
    if not 1 <= layers <= len(attentions):
        raise ValueError(
            f"layers={layers}, but this model has {len(attentions)}: ask for 1 to {len(attentions)}."
        )
    if prompts < 1:
        raise ValueError(f"prompts is the number of learned vectors per layer, so at least 1: got {prompts}.")
    wrapped = {name: kind(attentions[name], prompts, generator) for name in list(attentions)[-layers:]}
    model.requires_grad_(False)
    for name, layer in wrapped.items():
        layer.adaption_prompt.requires_grad_(True)
        layer.adaption_gate.requires_grad_(True)
        replace(model, name, layer)
    return model


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The model's attention layers by name, bottom to top, of the kinds whose queries we know how to compute."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in MODELS:
        raise ValueError(f"How {kind} makes its queries is not known here; known: {', '.join(MODELS)}.")
    return {name: module for name, module in model.named_modules() if hasattr(module, "q_proj")}


def prompted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The wrapped attention layers by name, told by what they carry: a learner's own PromptedAttention counts."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "adaption_gate", None), nn.Parameter)
    }


def remove_llama_adapter(model: nn.Module) -> nn.Module:
    """Take the wrappers away, in place: the (still frozen) base model, returned.

    There is no merging: what the prompts add depends on the query, and no weight of the model can stand for that.
    """
    for name, layer in prompted_layers(model).items():
        replace(model, name, layer.base)
    return model


def llama_adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors under PEFT's names on disk: base_model.model.<layer>.adaption_prompt, .adaption_gate."""
    return {
        f"base_model.model.{name}.{tensor}": getattr(layer, tensor).detach()
        for name, layer in prompted_layers(model).items()
        for tensor in ("adaption_prompt", "adaption_gate")
    }
