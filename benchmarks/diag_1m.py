import torch, time, subprocess, sys
import triton
sys.path.insert(0,'/tmp/rooms')
from fulmen.kernels.lightning import launch
from fulmen.models.layers import decay_slopes
dev=torch.device('cuda')
sl=decay_slopes(64,40,80,dev)
def t(f,ms=200): return triton.testing.do_bench(f,warmup=50,rep=ms,return_mode='median')
def clocks(): return subprocess.run(['nvidia-smi','--query-gpu=clocks.sm,power.draw,temperature.gpu,clocks_event_reasons.active','--format=csv,noheader'],capture_output=True,text=True).stdout.strip()
def att(q,k,v): return launch.triton_lightning_attention(q,k,v,sl,None,None,False)[0]
torch.manual_seed(0)
x=[torch.randn(1,32768,64,128,device=dev,dtype=torch.bfloat16) for _ in range(3)]
print('32K', t(lambda: att(*x)))
# sustained
for r in range(6):
    s,e=torch.cuda.Event(True),torch.cuda.Event(True); s.record()
    for _ in range(400): att(*x)
    e.record(); torch.cuda.synchronize(); print('sustained', r, s.elapsed_time(e)/400, clocks(),flush=True)
del x
N=1<<20
big=[torch.randn(1,N,64,128,device=dev,dtype=torch.bfloat16) for _ in range(3)]
for n in (65536,131072,262144,524288,N):
    y=[z[:,:n] for z in big]
    print(n,'per 32K', t(lambda: att(*y))*32768/n, clocks(),flush=True)
y=[z[:,N-131072:] for z in big]
print('last 131072 per 32K', t(lambda: att(*y))/4)
y=[z[:,N//2:N//2+131072] for z in big]
print('middle 131072 per 32K', t(lambda: att(*y))/4)
for w in (16384,24576,49152,65536):
    launch.WINDOW_TOKENS=w
    print('window',w,'1M per 32K', t(lambda: att(*big))/32,flush=True)
launch.WINDOW_TOKENS=32768
# one launch a window, independent rows: is it the state or the memory?
def rows():
    for i in range(0,N,32768): att(*[z[:,i:i+32768] for z in big])
print('1M as 32 separate rows per 32K', t(rows)/32)
out=torch.empty_like(big[0])
print('copy 17 GB TB/s', 2*big[0].nbytes/t(lambda: out.copy_(big[0]))/1e9)
a=big[0][:, :32768]; b=out[:, :32768]
print('copy .5 GB TB/s', 2*a.nbytes/t(lambda: b.copy_(a))/1e9)
# allocation of the output: does the caching allocator give fresh memory each call?
print(torch.cuda.memory_allocated()/2**30, torch.cuda.max_memory_allocated()/2**30, torch.cuda.memory_reserved()/2**30)
