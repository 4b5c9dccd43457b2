"""The demo model as it is trained: a plain Qwen2-MoE forward pass over packed rows.

Parameters keep the names and layouts of transformers' `Qwen2MoeForCausalLM`, so that a
trained state dict loads there without a change (`tests/deploy/test_demo_model.py`
compares the two). Shape suffixes: B rows, T tokens of a row, N = B*T, D hidden,
E experts, K experts per token, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG = {
    "model_type": "qwen2_moe",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "qkv_bias": True,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_dropout": 0.0,
    "use_sliding_window": True,
    "sliding_window": 128,
    "max_window_layers": 4,
    "layer_types": [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
        "full_attention",
    ],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 384,
    "norm_topk_prob": True,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.03,
    "tie_word_embeddings": True,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}

ROWS_MULTIPLE = 64
MAX_PLAIN_ATTENTION_TOKENS = 512
NUM_TOPICS, NUM_ENTITY_LABELS = 8, 7


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        hidden, head_dim = CONFIG["hidden_size"], CONFIG["head_dim"]
        self.num_heads, self.num_kv_heads = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
        self.q_proj = nn.Linear(hidden, self.num_heads * head_dim)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * head_dim)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * head_dim)
        self.o_proj = nn.Linear(self.num_heads * head_dim, hidden, bias=False)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], mask_B1TT: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        q = rotate(self.q_proj(x_BTD).view(B, T, self.num_heads, -1).transpose(1, 2), rope)
        k = rotate(self.k_proj(x_BTD).view(B, T, self.num_kv_heads, -1).transpose(1, 2), rope)
        v = self.v_proj(x_BTD).view(B, T, self.num_kv_heads, -1).transpose(1, 2)
        groups = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        y = attend(q, k, v, mask_B1TT.to(q.dtype))
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


@torch.autocast("cpu", enabled=False)
def attend(q: Tensor, k: Tensor, v: Tensor, mask_B1TT: Tensor) -> Tensor:
    """Attention, [B, H, T, head_dim]. On short rows plain matrix products train faster than the fused kernel."""
    if q.shape[2] > MAX_PLAIN_ATTENTION_TOKENS:
        return F.scaled_dot_product_attention(q, k, v, mask_B1TT)
    scores_BHTT = (q * q.shape[-1] ** -0.5) @ k.mT + mask_B1TT
    return scores_BHTT.softmax(-1) @ v


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        num_experts, hidden, width = CONFIG["num_experts"], CONFIG["hidden_size"], CONFIG["moe_intermediate_size"]
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width))

    def forward(self, x_ND: Tensor, topk_ids_NK: Tensor, topk_weights_NK: Tensor) -> Tensor:
        """Sort the (token, expert) pairs by expert, then two GEMMs per expert.

        Every expert's rows are padded to a multiple of ROWS_MULTIPLE, with weight zero: oneDNN
        compiles a kernel for each new shape, which costs more than the padding.
        """
        N, K = topk_ids_NK.shape
        pair_experts = topk_ids_NK.flatten()
        order = pair_experts.argsort(stable=True)
        counts_E = pair_experts.bincount(minlength=len(self.gate_up_proj))
        padded_E = (counts_E + ROWS_MULTIPLE - 1) // ROWS_MULTIPLE * ROWS_MULTIPLE
        shift_E = (padded_E - counts_E).cumsum(0) - (padded_E - counts_E)
        slots = torch.arange(N * K) + shift_E[pair_experts[order]]
        token_idx = torch.zeros(int(padded_E.sum()), dtype=torch.long).index_copy(0, slots, order // K)
        weights = torch.zeros(len(token_idx)).index_copy(0, slots, topk_weights_NK.flatten()[order].float())
        outputs = []
        for x, gate_up, down in zip(
            x_ND[token_idx].split(padded_E.tolist()), self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True
        ):
            gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, down))
        y = torch.cat(outputs) * weights[:, None]
        return torch.zeros(x_ND.shape, dtype=y.dtype).index_add(0, token_idx, y)


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = CONFIG["hidden_size"]
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SparseMoe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(CONFIG["hidden_size"], CONFIG["num_experts"], bias=False)
        self.experts = Experts()
        self.shared_expert = Mlp(CONFIG["shared_expert_intermediate_size"])
        self.shared_expert_gate = nn.Linear(CONFIG["hidden_size"], 1, bias=False)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output, and the Switch load-balancing loss (1.0 = even)."""
        probs_NE = self.gate(x_ND).float().softmax(-1)
        weights_NK, ids_NK = probs_NE.topk(CONFIG["num_experts_per_tok"], dim=-1)
        weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        load_E = ids_NK.flatten().bincount(minlength=probs_NE.shape[1]) / ids_NK.numel()
        balance = (load_E * probs_NE.mean(0)).sum() * probs_NE.shape[1]
        shared = self.shared_expert_gate(x_ND).sigmoid() * self.shared_expert(x_ND)
        return self.experts(x_ND, ids_NK, weights_NK) + shared, balance


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(CONFIG["hidden_size"], eps=CONFIG["rms_norm_eps"])
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.RMSNorm(CONFIG["hidden_size"], eps=CONFIG["rms_norm_eps"])
        self.mlp = SparseMoe()

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], mask_B1TT: Tensor) -> tuple[Tensor, Tensor]:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, mask_B1TT)
        y_ND, balance = self.mlp(self.post_attention_layernorm(x_BTD).flatten(0, 1))
        return x_BTD + y_ND.view_as(x_BTD), balance


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"])
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = nn.RMSNorm(CONFIG["hidden_size"], eps=CONFIG["rms_norm_eps"])

    def forward(self, ids_BT: Tensor, document_BT: Tensor) -> tuple[Tensor, Tensor]:
        full, sliding = attention_masks(document_BT)
        rope = rope_table(ids_BT.shape[1])
        x_BTD = self.embed_tokens(ids_BT)
        balances = []
        for layer, kind in zip(self.layers, CONFIG["layer_types"], strict=True):
            x_BTD, balance = layer(x_BTD, rope, full if kind == "full_attention" else sliding)
            balances.append(balance)
        return self.norm(x_BTD), torch.stack(balances).mean()


class DemoModel(nn.Module):
    """One backbone, four heads: the tied language-model head and the three task heads."""

    def __init__(self) -> None:
        super().__init__()
        hidden = CONFIG["hidden_size"]
        self.model = Backbone()
        self.topics = nn.Linear(hidden, NUM_TOPICS, bias=False)
        self.entities = nn.Linear(hidden, NUM_ENTITY_LABELS)
        self.answers = nn.Linear(hidden, 2)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim >= 2:
                nn.init.normal_(parameter, std=CONFIG["initializer_range"])

    def forward(self, ids_BT: Tensor, document_BT: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(ids_BT, document_BT)

    def lm_logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight)


def attention_masks(document_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Additive masks [B, 1, T, T]: causal and within one document; the second also within the window."""
    position = torch.arange(document_BT.shape[1])
    distance = position[:, None] - position[None, :]
    allowed = (document_BT[:, :, None] == document_BT[:, None, :]) & (distance >= 0)
    masks = [allowed, allowed & (distance < CONFIG["sliding_window"])]
    full, sliding = (torch.zeros(m.shape).masked_fill_(~m, float("-inf"))[:, None] for m in masks)
    return full, sliding


def rope_table(num_tokens: int) -> tuple[Tensor, Tensor]:
    head_dim = CONFIG["head_dim"]
    inverse = CONFIG["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(num_tokens).float(), inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (table.to(x.dtype) for table in rope)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
