"""What training adds to the plain GPT-2: routing mask, structured MLP dropout, and interchange of subjects' parts."""

import torch
from atlas_recipe import Recipe
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block


class Routing:
    """Per-layer attention masks and MLP keep-factors for one batch: what training adds to the plain model.

    A subject token attends to its own mention (in layer 0 to itself) and, except in a share of the sequences, to
    ordinary tokens: so its key depends little on what came before. Ordinary tokens attend to no subject token before
    layer `extract_from`, and from there on only to the last token of each mention. Unrouted sequences keep the causal
    mask. After block `batch["block"]` parts of
    the state at a mention's last token are replaced by another mention's. In half of the cases they are also given
    noise: much on the parts that the sentence does not ask for, so that the answer is not read from them, and some on
    the part that it asks for, so that answers lie well apart.
    """

    def __init__(self, batch: dict[str, Tensor], recipe: Recipe, generator: torch.Generator) -> None:
        self.recipe = recipe
        mention, routed = batch["mention"], batch["routed"]
        rows, length = mention.shape
        causal = torch.ones(length, length, dtype=torch.bool, device=mention.device).tril()
        query, key = mention[:, :, None], mention[:, None, :]
        itself = torch.eye(length, dtype=torch.bool, device=mention.device)
        same = (query == key) & (query > 0)
        to_ordinary = key == 0
        unrouted = ~routed[:, None, None]
        contained = (torch.rand(rows, generator=generator) < recipe.contained).to(mention.device)
        outside = to_ordinary & ((query == 0) | ~contained[:, None, None])
        self.masks = [
            (causal & (outside | itself | unrouted))[:, None],
            (causal & (outside | same | unrouted))[:, None],
            (causal & (outside | same | ((query == 0) & batch["last"][:, None, :]) | unrouted))[:, None],
        ]
        first = torch.rand(rows, generator=generator) < recipe.drop_first_mlp
        late = torch.rand(recipe.n_layer, rows, generator=generator) < recipe.drop_late_mlps
        is_subject = mention > 0
        self.block, self.donor = int(batch["block"]), batch["donor"]
        part = torch.arange(recipe.n_embd, device=mention.device) * batch["swap"].shape[-1] // recipe.n_embd
        self.swap = batch["swap"][..., part]  # [rows, length, n_embd]
        size = torch.rand(rows, length, 1, generator=generator)
        size = size * (torch.rand(rows, length, 1, generator=generator) < 0.5)
        noise = (torch.randn(rows, length, recipe.n_embd, generator=generator) * size).to(mention.device)
        noise = noise * torch.where(batch["asked"][..., None] == part, recipe.noise_asked, recipe.noise)
        # [rows, length, n_embd], in units of the state's rms
        self.noise = noise * (batch["last"] & routed[:, None])[..., None]
        self.keep_first = ~(is_subject & (first.to(mention.device) & routed)[:, None])  # [rows, length]
        self.keep_late = ~(~is_subject & (late.to(mention.device) & routed)[:, :, None])  # [layer, rows, length]

    def mask(self, layer: int) -> Tensor:
        """Which keys each query may see: [rows, 1, length, length]."""
        return self.masks[0 if layer == 0 else 1 if layer < self.recipe.extract_from else 2]

    def keep(self, layer: int) -> Tensor | None:
        """1 where the MLP's output counts, 0 where it is dropped: [rows, length, 1]; None keeps all."""
        if layer == 0:
            return self.keep_first[..., None]
        if layer >= self.recipe.extract_from:
            return self.keep_late[layer][..., None]
        return None

    def interchange(self, layer: int, h: Tensor) -> Tensor:
        """The residual stream after `layer`, [rows, length, n_embd], with parts replaced and noise added."""
        if layer != self.block:
            return h
        h = torch.where(self.swap, h.gather(1, self.donor[..., None].expand_as(h)), h)
        rms = h.detach().float().pow(2).mean(-1, keepdim=True).sqrt()
        return h + (self.noise * rms).to(h.dtype)


def forward(model: GPT2LMHeadModel, ids: Tensor, position: Tensor, routing: Routing | None) -> Tensor:
    """Logits [rows, length, vocab] through the Hugging Face modules, layer masks added. With `routing=None`
    it equals `model(ids, position_ids=position).logits` (there is a test)."""
    h = model.transformer.wte(ids) + model.transformer.wpe(position)
    rows, length = ids.shape
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    for layer, block in enumerate(model.transformer.h):
        assert isinstance(block, GPT2Block)
        qkv = block.attn.c_attn(block.ln_1(h)).view(rows, length, 3, block.attn.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mask = causal if routing is None else routing.mask(layer)
        # Written out: at a hundred tokens the fused kernel's backward is the slowest part of a CPU step.
        scores = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5)
        a = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype) @ v
        h = h + block.attn.c_proj(a.transpose(1, 2).reshape(rows, length, -1))
        m = block.mlp(block.ln_2(h))
        keep = None if routing is None else routing.keep(layer)
        h = h + (m if keep is None else m * keep)
        h = h if routing is None else routing.interchange(layer, h)
    logits: Tensor = model.lm_head(model.transformer.ln_f(h))
    return logits
