"""Temporary: a tower's own pretraining, then text, alignment and all, in one process; times by argument."""
import math
import sys
import time

import torch

from fulmen.data.config import SourceConfig
from fulmen.data.loader import PackedLoader, evaluation_batches
from fulmen.data.mixture import Shares
from fulmen.data.shards import PreparedSplit
from fulmen.data.tokenise import load_tokenizer
from fulmen.models.config import CoCaConfig, ModelConfig, MoEConfig, VisionConfig
from fulmen.models.init import init_model
from fulmen.models.vl import build_model
from fulmen.trainer.caption_inputs import caption_inputs
from fulmen.trainer.inputs import model_inputs

torch.set_num_threads(1); torch.manual_seed(0)
o = dict(data="/tmp/d/a", patch=12, tile=48, vl=4, vh=64, vheads=4, vm=2,  # tower
         cl=3, cu=1, ch=64, con=1.0, cmb=1024, clr=2e-3, cpos=1.0, cstd=0.0,  # captioner
         L=4, every=2, h=64, e=4, eh=96, lr=2e-3, mb=1024, seq=256, text=0.05, vlr=0.5, alpha=0.0,
         t=120.0, tt=25.0, ta=25.0, tj=80.0, warm=50, wd=.1, beta2=.98, aux=.01, name="x", until=9e9)
for a in sys.argv[1:]:
    k, v = a.split("="); o[k] = type(o[k])(v)
O = type("O", (), o)
V = VisionConfig(num_layers=O.vl, hidden_size=O.vh, num_attention_heads=O.vheads, mlp_hidden_size=O.vm*O.vh,
        tile_size=O.tile, patch_size=O.patch, image_token_id=1, max_tiles_per_side=3, max_tiles=6)
cc = ModelConfig(num_layers=O.cl, hidden_size=O.ch, num_attention_heads=4, num_key_value_heads=4, head_dim=O.ch//4, rotary_dim=0,
    num_experts=1, num_experts_per_token=1, expert_hidden_size=2*O.ch, vocab_size=320, softmax_every=1, vision=V,
    coca=CoCaConfig(num_unimodal_layers=O.cu, embedding_size=64, max_text_tokens=24, contrastive_weight=O.con))
c = ModelConfig(num_layers=O.L, hidden_size=O.h, num_attention_heads=4, num_key_value_heads=2, head_dim=O.h//4, rotary_dim=O.h//8,
    num_experts=O.e, num_experts_per_token=2, expert_hidden_size=O.eh, vocab_size=320, softmax_every=O.every,
    residual_alpha=O.alpha or None, vision=V)
class M: cp = 1; cp_rank = 0; rank = 0; dp = 1; dp_rank = 0; device = torch.device("cpu")
tok = load_tokenizer(O.data + "/conversations/tokenizer.json")
colours = {tok.encode(p + x, add_special_tokens=False).ids[0] for p in ("", " ") for x in ("white", "red", "green", "blue", "yellow", "pink")}
quote = tok.encode(' "', add_special_tokens=False).ids[-1]; quotes = {quote, tok.encode('"', add_special_tokens=False).ids[0]}
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
def captioned(L, P, acc):
    """Of one caption: what is between the quotes, and the colour."""
    L = [x for x in L if x >= 0]; P = P[:len(L)]
    q = [n for n, x in enumerate(L) if x in quotes]
    a, b = q[0] + 1, q[1] + 1
    for k in range(a, b): acc.setdefault(f"l{k-a}", []).append(P[k] == L[k])
    acc.setdefault("all", []).append(P[a:b] == L[a:b])
    acc.setdefault("colour", []).append(P[b+1] == L[b+1])
def say(acc): return " ".join(f"{k}:{100*sum(v)/len(v):.1f}" for k, v in sorted(acc.items()))
def batches(kind):
    split = PreparedSplit(f"{O.data}/{kind}", "valid", name="x", vocab_size=320)
    return evaluation_batches(split, seq_len=O.seq, micro_batch_tokens=O.seq*8, max_tokens=9000, dp_rank=0, dp_size=1, tile_part=(0, 1))
@torch.no_grad()
def score(m, coca):
    acc = {}
    if coca:
        seen = []
        hook = m.norm.register_forward_hook(lambda _, i, out: seen.append(out))
        for b in batches("captions"):
            px, cap = caption_inputs(b, cc, M.device); m(px, cap)
            P = (seen.pop() @ m.lm_head.weight.T).argmax(-1).tolist(); L = cap.labels.tolist()
            for l, p in zip(L, P): captioned(l, p, acc)
        hook.remove()
        return say(acc)
    for kind in ("aligned", "conversations"):
        acc = {}
        for b in batches(kind):
            inp = model_inputs(b, M, c.vision); lab = inp.pop("labels")
            spans(lab.flatten().tolist(), m(**inp).argmax(-1).flatten().tolist(), acc)
        if kind == "aligned": fixed = say(acc)
    return f"fixed {100*0 if not fixed else 0:.0f} [{fixed}] dynamic [{say(acc)}]"
def train(m, weights, seconds, params, lr, mb_tokens, coca=False, decay=True):
    src = {k: SourceConfig(f"{O.data}/{k}", w) for k, w in weights.items() if w}
    S = sum(s.weight for s in src.values())
    l = PackedLoader(src, seq_len=O.seq, micro_batch_tokens=mb_tokens, batch_tokens=lambda t: mb_tokens,
        shares=lambda t: Shares({k: s.weight/S for k, s in src.items()}, None), length_bounds=[16384, 131072], seed=0,
        vocab_size=320, dp_rank=0, dp_size=1, prefetch_steps=2, image_workers=0, tile_part=(0, 1), state=None)
    groups = []
    for ps, f in params:
        groups += [dict(params=[p for p in ps if p.dim() > 1], f=f), dict(params=[p for p in ps if p.dim() < 2], f=f, weight_decay=0)]
    opt = torch.optim.AdamW(groups, lr=lr, betas=(.9, O.beta2), weight_decay=O.wd, fused=True)
    allp = [p for ps, _ in params for p in ps]
    for p in m.parameters(): p.requires_grad_(False)
    for p in allp: p.requires_grad_(True)
    begun = shown = time.process_time(); tokens = docs = step = 0
    kind = "coca" if coca else "+".join(src)
    while (gone := (time.process_time() - begun) / seconds) < 1:
        b = next(l); mb = b.micro_batches[0]
        if coca:
            px, cap = caption_inputs(mb, cc, M.device); out = m(px, cap)
            loss = 2 * out.caption_loss_sum / (cap.labels >= 0).sum() + O.con * out.contrastive_loss_sum / len(px)
        else:
            inp = model_inputs(mb, M, c.vision); out = m(**inp)
            loss = out.loss_sum / (inp["labels"] >= 0).sum() + O.aux * out.aux_loss
        f = min(1, (step + 1) / O.warm) * (min(1, 3 * (1 - gone)) * .97 + .03 if decay else 1)
        for g in opt.param_groups: g["lr"] = lr * f * g["f"]
        opt.zero_grad(); loss.backward()
        torch.nn.utils.clip_grad_norm_(allp, 1.0); opt.step()
        tokens += b.num_tokens; docs += len(mb.cu_seqlens) - 1; step += 1
        if time.process_time() - shown > seconds / 5:
            if seconds < 20: shown += seconds; continue
            lost = time.process_time()
            print(f"{O.name} {kind} {time.process_time()-begun:.0f}s step {step} {tokens/1e3:.0f}k {docs} docs loss {loss.item():.3f} {score(m, coca)}", flush=True)
            lost = time.process_time() - lost; begun += lost; shown = time.process_time()
    print(f"{O.name} {kind} END {seconds:.0f}s {step} {tokens/1e3:.0f}k {docs} docs loss {loss.item():.3f} {score(m, coca)}", flush=True)
    l.close()
tower = None
if O.t:
    m = build_model(cc, MoEConfig()); init_model(m, cc, 0)
    E = m.vision_tower.vision_model.embeddings
    with torch.no_grad():
        if O.cpos: E.position_embedding.weight.normal_(0, O.cpos)
        if O.cstd: E.patch_embedding.weight.normal_(0, O.cstd)
    train(m, {"captions": 1.0}, O.t, [(list(m.parameters()), 1.0)], O.clr, O.cmb, coca=True)
    tower = m.vision_tower.state_dict()
if O.tj:
    m = build_model(c, MoEConfig()); init_model(m, c, 0)
    if tower: m.vision_tower.load_state_dict(tower)
    isvis = lambda n: n.startswith(("vision", "multi", "image_"))
    vis = [p for n, p in m.named_parameters() if isvis(n)]
    adapt = [p for n, p in m.named_parameters() if n.startswith(("multi", "image_"))]
    twr = [p for n, p in m.named_parameters() if n.startswith("vision")]
    lang = [p for n, p in m.named_parameters() if not isvis(n)]
    if O.tt: train(m, {"texts": 1.0}, O.tt, [(lang, 1.0)], O.lr, O.mb)
    if O.ta: train(m, {"aligned": 1.0}, O.ta, [(adapt, 1.0), (twr, O.vlr)], O.lr, O.mb)
    train(m, {"conversations": 1.0, "texts": O.text}, O.tj, [(lang + adapt, 1.0), (twr, O.vlr)], O.lr, O.mb)
