"""StarCoder 2: LayerNorm and GELU with biases everywhere, rotary positions, a sliding window."""

from __future__ import annotations

from litgpt.families._architecture import Architecture, Key, activation, sizes, table, window, without
from litgpt.families._family import Family
from litgpt.families._gguf import Gguf
from litgpt.families._rope import rope
from litgpt.families.llama import ATTENTION, ENDS, LAYERS, NORMS

_2 = {
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": True,
    "norm_class_name": "LayerNorm",
    "mlp_class_name": "GptNeoxMLP",
}

FAMILY = Family(
    [],
    hf={
        "starcoder2": Architecture(
            "Starcoder2ForCausalLM",
            table(LAYERS, {**NORMS, **ATTENTION, "mlp.c_fc": "mlp.fc", "mlp.c_proj": "mlp.proj"}, ENDS),
            {**without(sizes(), "head_dim"), "norm_epsilon": Key("norm_eps", 1e-5)},
            _2,
            {"use_bias": (True,)},
            (window(None), activation("hidden_act", "gelu_pytorch_tanh"), rope()),
            tied=True,
        )
    },
    gguf={"starcoder2": Gguf({**_2, "gelu_approximate": "tanh"})},
)
