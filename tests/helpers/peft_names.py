"""The layers of a Llama by PEFT's names: those of each flag, and the modules of ours; q, k and v are parts of attn.qkv."""

PEFT_NAMES = {
    "lora_query": ["q_proj"],
    "lora_key": ["k_proj"],
    "lora_value": ["v_proj"],
    "lora_projection": ["o_proj"],
    "lora_mlp": ["gate_proj", "up_proj", "down_proj"],
    "lora_head": ["lm_head"],
}
PEFT_TO_LITGPT = {"o_proj": "attn.proj", "gate_proj": "mlp.fc_1", "up_proj": "mlp.fc_2", "down_proj": "mlp.proj"}
