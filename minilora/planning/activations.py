"""What autograd keeps between forward and backward, counted tensor by tensor.

M tokens in a pass (B rows of T), h width of the residual stream, i inner width of the MLP,
q = heads · head_dim, kv = kv_heads · head_dim, r rank, w bytes of an element computed with,
s bytes of an element of the residual stream (s = w, but 4 under autocast).

Every tensor a block keeps stands in one line of `block`; `tests/test_planning_activations.py` holds
the sum against what `torch.autograd.graph.saved_tensors_hooks` sees, to the byte. Who changes how
a block computes changes that line.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from minilora.models import GPT2Config, LlamaConfig
from minilora.planning.shapes import Config, Linear

_F32 = 4


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: B rows of T tokens, and in which bytes it computes.

    Attributes:
        B: rows.
        T: tokens of a row.
        w: bytes of an element of what is multiplied.
        autocast: whether an f32 model runs under autocast: the residual stream is then f32, and
            each linear keeps its own copy of its input.
        dropout: whether adapters drop inputs: each then keeps a mask, a byte an element.
        of_loss: tokens that enter the loss; None: all but each row's first.
    """

    B: int
    T: int
    w: int
    autocast: bool = False
    dropout: bool = False
    of_loss: int | None = None

    @property
    def learned(self) -> int:
        """Tokens that enter the loss."""
        return self.tokens - self.B if self.of_loss is None else self.of_loss

    @property
    def tokens(self) -> int:
        """M: all of them."""
        return self.B * self.T

    @property
    def s(self) -> int:
        """Bytes of an element of the residual stream."""
        return _F32 if self.autocast else self.w


def _inputs(groups: Iterable[list[Linear]], p: Pass, first: bool) -> int:
    """Inputs kept by the adapted linears: one for all that read the same tensor, S = x Aᵀ each."""
    total = 0
    for at, group in enumerate(groups):
        adapted = [one for one in group if one.r]
        if p.autocast and not (first and at == 0):  # weights that autocast narrowed
            total += sum(one.N * one.K * p.w for one in group if not one.r)
        if not adapted:
            continue
        copies = len(adapted) if p.autocast else 1
        total += copies * p.tokens * adapted[0].K * p.w
        total += sum(p.tokens * one.r * p.w for one in adapted)
        if p.dropout:
            total += sum(p.tokens * one.K for one in adapted)
    return total


def _llama_block(config: LlamaConfig, linears: dict[str, Linear], p: Pass, first: bool) -> int:
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    M, h, i = p.tokens, config.hidden_size, config.intermediate_size
    one = linears.__getitem__
    groups = [
        [one("q_proj"), one("k_proj"), one("v_proj")],
        [one("o_proj")],  # its input is a copy of attention's output, in another order
        [one("gate_proj"), one("up_proj")],
        [one("down_proj")],
    ]
    return (
        _inputs(groups, p, first)
        + 2 * M * h * p.s  # norms: input
        + M * (q + 2 * kv + q) * p.w  # attention: q, k, v, output
        + M * config.num_attention_heads * _F32  # and its log-sum-exp
        + M * 2 * i * p.w  # gate, up
    )


def _gpt2_block(config: GPT2Config, linears: dict[str, Linear], p: Pass, first: bool) -> int:
    M, h, i = p.tokens, config.n_embd, config.intermediate_size
    attention, out = linears["attn.c_attn"], linears["attn.c_proj"]
    fc, proj = linears["mlp.c_fc"], linears["mlp.c_proj"]
    # Attention's output lies in the order the projection reads: one tensor for both.
    shared = M * h * p.w if not out.r else 0
    return (
        _inputs([[attention], [out], [fc], [proj]], p, first)
        + 2 * (M * h + 2 * M) * p.s  # norms: input, mean and 1 / deviation
        + shared
        + M * 3 * h * p.w  # q, k, v, as one
        + M * config.n_head * _F32  # attention's log-sum-exp
        + M * i * p.w  # before the activation
    )


def linears_by_block(linears: dict[str, Linear]) -> dict[int, dict[str, Linear]]:
    """Return the linears of each block by the names `block_saved` knows."""
    found: dict[int, dict[str, Linear]] = {}
    for name, one in linears.items():
        parts = name.split(".")
        for at, part in enumerate(parts[1:], 1):
            if part.isdigit() and parts[at - 1] in ("h", "layers"):
                rest = parts[at + 1 :]
                short = ".".join(rest) if parts[at - 1] == "h" else rest[-1]
                found.setdefault(int(part), {})[short] = one
    return found


def block_saved(config: Config, linears: dict[str, Linear], p: Pass, first: bool = False) -> int:
    """Return the bytes that one block keeps; `first`: no gradient of its input is asked for."""
    if isinstance(config, GPT2Config):
        kept = _gpt2_block(config, linears, p, first)
    else:
        kept = _llama_block(config, linears, p, first)
    return kept - (_norm_saved(config, p) if first else 0)


def _norm_saved(config: Config, p: Pass) -> int:
    if isinstance(config, GPT2Config):
        return (p.tokens * config.n_embd + 2 * p.tokens) * p.s
    return p.tokens * config.hidden_size * p.s


def saved(config: Config, linears: dict[str, Linear], p: Pass, checkpointing: bool) -> int:
    """Return the bytes that lie between forward and backward, beside parameters and the loss.

    With checkpointing these are the blocks' inputs; what one block keeps while it is run again
    comes on top (`block_saved`).
    """
    layers = config.num_hidden_layers
    head = p.w * p.learned * config.hidden_size  # the loss keeps its gradient for the head's input
    last = _norm_saved(config, p)
    if checkpointing:
        between = layers * p.tokens * config.hidden_size * p.s
        return between + last + head
    inside = linears_by_block(linears)
    blocks = sum(block_saved(config, inside[n], p, n == 0) for n in range(layers))
    rotation = 0 if isinstance(config, GPT2Config) else p.T * config.head_dim * p.s
    return blocks + last + head + rotation
