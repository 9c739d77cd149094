"""Temporary: how fast small models learn to read, by their shape; single processes."""
import math
import sys
import time

import torch

from fulmen.data.config import SourceConfig
from fulmen.data.loader import PackedLoader, evaluation_batches
from fulmen.data.mixture import Shares
from fulmen.data.shards import PreparedSplit
from fulmen.data.tokenise import load_tokenizer
from fulmen.models.config import ModelConfig, MoEConfig, VisionConfig
from fulmen.models.init import init_model
from fulmen.models.vl import build_model
from fulmen.trainer.inputs import model_inputs

torch.set_num_threads(1); torch.manual_seed(0)
o = dict(data="/tmp/d/a16", patch=16, tile=32, vl=4, vh=128, vheads=4, L=4, every=2, h=128, e=8, eh=192,
         lr=1e-3, vlr=1.0, pos=1.0, patchstd=0.04, T=430.0, mb=2048, warm=50, cap=0.0, invert=0.0, beta2=.95,
         wd=.1, name="x", text=0.0, t0=0.0, t1=0.0, alpha=0.0, seq=256, aux=.01, mean=0)
for a in sys.argv[1:]:
    k, v = a.split("="); o[k] = type(o[k])(v)
O = type("O", (), o)
c = ModelConfig(num_layers=O.L, hidden_size=O.h, num_attention_heads=4, num_key_value_heads=2, head_dim=32, rotary_dim=16,
    num_experts=O.e, num_experts_per_token=2, expert_hidden_size=O.eh, vocab_size=320, softmax_every=O.every,
    residual_alpha=O.alpha or None,
    vision=VisionConfig(num_layers=O.vl, hidden_size=O.vh, num_attention_heads=O.vheads, mlp_hidden_size=2*O.vh,
        tile_size=O.tile, patch_size=O.patch, image_token_id=1, max_tiles_per_side=3, max_tiles=6))
m = build_model(c, MoEConfig()); init_model(m, c, 0)
E = m.vision_tower.vision_model.embeddings
with torch.no_grad():
    if O.pos: E.position_embedding.weight.normal_(0, O.pos); E.class_embedding.normal_(0, O.pos)
    if O.patchstd: E.patch_embedding.weight.normal_(0, O.patchstd)
class M: cp = 1; cp_rank = 0; rank = 0; dp = 1; dp_rank = 0; device = torch.device("cpu")
isvis = lambda n: n.startswith(("vision", "multi", "image_"))
vis = [p for n, p in m.named_parameters() if isvis(n)]
lang = [p for n, p in m.named_parameters() if not isvis(n)]
tok = load_tokenizer(O.data + "/conversations/tokenizer.json")
colours = {tok.encode(x, add_special_tokens=False).ids[0] for x in ("black", "red", "green", "blue", "purple", "brown")}
def inputs(mb):
    inp = model_inputs(mb, M, c.vision); im = inp["images"]
    if O.invert: inp["images"] = type(im)(O.invert * (1.93 - im.pixels), im.places, im.sources, im.route)
    return inp
def spans(L, P, acc):
    i = 0
    while i < len(L):
        if L[i] < 0: i += 1; continue
        j = i
        while j < len(L) and L[j] >= 0: j += 1
        if j - i < 8:
            if L[i] in colours: acc.setdefault("colour", []).append(P[i] == L[i])
            else:
                for k in range(j - i): acc.setdefault(f"l{k}", []).append(P[i+k] == L[i+k])
                acc.setdefault("all", []).append(P[i:j] == L[i:j])
        i = j
def say(acc): return " ".join(f"{k}:{100*sum(v)/len(v):.1f}" for k, v in sorted(acc.items()))
def score():
    acc = {}
    split = PreparedSplit(O.data + "/conversations", "valid", name="x", vocab_size=320)
    with torch.no_grad():
        for b in evaluation_batches(split, seq_len=O.seq, micro_batch_tokens=O.seq*8, max_tokens=12000, dp_rank=0, dp_size=1, tile_part=(0, 1)):
            inp = inputs(b); lab = inp.pop("labels")
            spans(lab.flatten().tolist(), m(**inp).argmax(-1).flatten().tolist(), acc)
    return say(acc)
def train(weights, seconds, params, lr, schedule):
    src = {k: SourceConfig(f"{O.data}/{k}", w) for k, w in weights.items() if w}
    S = sum(s.weight for s in src.values())
    l = PackedLoader(src, seq_len=O.seq, micro_batch_tokens=O.mb, batch_tokens=lambda t: O.mb,
        shares=lambda t: Shares({k: s.weight/S for k, s in src.items()}, None), length_bounds=[16384, 131072], seed=0,
        vocab_size=320, dp_rank=0, dp_size=1, prefetch_steps=2, image_workers=0, tile_part=(0, 1), state=None)
    opt = torch.optim.AdamW([dict(params=ps, f=f) for ps, f in params], lr=lr, betas=(.9, O.beta2), weight_decay=O.wd)
    allp = [p for ps, _ in params for p in ps]
    for p in m.parameters(): p.requires_grad_(False)
    for p in allp: p.requires_grad_(True)
    begun = shown = time.time(); tokens = docs = step = 0; acc = {}
    while (gone := (time.time() - begun) / seconds) < 1:
        b = next(l); mb = b.micro_batches[0]; inp = inputs(mb); lab = inp["labels"]
        out = m(**inp)
        loss = out.loss_sum / (lab >= 0).sum() + O.aux * out.aux_loss
        f = min(1, (step + 1) / O.warm) * (math.cos(math.pi/2*gone) if schedule else 1)
        for g in opt.param_groups: g["lr"] = lr * f * g["f"]
        opt.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(allp, 1.0); opt.step()
        tokens += b.num_tokens; docs += len(mb.cu_seqlens) - 1; step += 1
        if time.time() - shown > seconds / 10:
            shown = time.time()
            print(f"{O.name} {list(src)} {time.time()-begun:.0f}s step {step} {tokens/1e3:.0f}k {docs} docs loss {loss.item():.3f} held out: {score()}", flush=True)
    print(f"{O.name} {list(src)} END {step} {tokens/1e3:.0f}k {docs} docs held out: {score()}", flush=True)
    l.close()
if O.t0: train({"texts": 1.0}, O.t0, [(lang, 1.0)], O.lr, False)
if O.t1: train({"conversations": 1.0}, O.t1, [(vis, O.vlr)], O.lr, False)
train({"conversations": 1.0, "captions": O.cap, "texts": O.text}, O.T - O.t0 - O.t1, [(lang, 1.0), (vis, O.vlr)], O.lr, True)
