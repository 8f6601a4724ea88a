import sys, time
from pathlib import Path
import torch
from nemo_ssopd.config import *
from nemo_ssopd.algo.objective import sft_loss
from nemo_ssopd.hf_config import read_hf_config
from nemo_ssopd.megatron.actor import MegatronGRPOActor
from nemo_ssopd.megatron.checkpoint import *
from nemo_ssopd.megatron.runtime import initialize
from nemo_ssopd.types import *
from tests.distributed import run_distributed
from tests.megatron.hf_models import save_random_model

def make(path, run_dir, world, tensor, lora, dist_opt):
    return Config(run_dir=run_dir, model=ModelConfig(path=path, dtype="float32"), lora=LoraConfig(enabled=lora, rank=4, alpha=8.),
      parallel=ParallelConfig(world_size=world, tensor=tensor), data=DataConfig(train="demo:x"),
      optimizer=OptimizerConfig(lr=1e-2, warmup_steps=3, distributed=dist_opt), trainer=TrainerConfig(keep_checkpoints=2, token_budget=64))

def batch(runtime, step):
    g = torch.Generator().manual_seed(step)
    seqs = [Sequence(tuple(torch.randint(96, (12,), generator=g).tolist()), 4) for _ in range(4)]
    mine = seqs[runtime.dp_rank::runtime.dp_size]
    return TrainBatch(tuple(mine), tuple((1.,)*8 for _ in mine), StepCounts(32, 4))

def weights(actor): return {n: t.clone() for n, t in actor.weights()}

def run(config, steps, save_at, resume):
    t0=time.time()
    runtime = initialize(config.parallel, seed=1)
    actor = MegatronGRPOActor(config, read_hf_config(config.model.path), runtime, pad_id=0)
    state = LoopState()
    out = {}
    if resume:
        t=time.time(); state = load_checkpoint(actor, config); out["load_s"]=time.time()-t
    out["start"]=state.step
    out["w0"]=weights(actor)
    while state.step < steps:
        r = actor.update(batch(runtime, state.step), sft_loss)
        state = state.after({"progress/tokens": Sum(32), **r.metrics})
        out[f"norm{state.step}"]=r.metrics["optim/grad_norm"].value()
        out[f"w{state.step}"]=weights(actor)
        if state.step in save_at:
            t=time.time(); save_checkpoint(actor, config, state); out[f"save_s{state.step}"]=time.time()-t
    return out
from nemo_ssopd.metrics import Sum
if __name__ == "__main__":
    import tempfile
    tmp = Path(tempfile.mkdtemp())
    path = save_random_model("qwen3_tied", tmp/"m")
    for world, tensor, lora, d in [(2,2,True,True),(2,2,False,True),(2,1,True,True),(2,1,True,False),(2,2,False,False)]:
        rd = str(tmp/f"run{world}{tensor}{lora}{d}")
        c = make(path, rd, world, tensor, lora, d)
        t=time.time()
        a = run_distributed(run, world, c, 5, [2,3], False)
        b = run_distributed(run, world, c, 5, [], True)
        for x, y in zip(a,b):
            same = y["start"]==3 and all(torch.equal(x[f"w{s}"][n], y[f"w{s}"][n]) for s in (4,5) for n in x["w4"]) and x["norm5"]==y["norm5"] and x["norm4"]==y["norm4"]
            moved = not all(torch.equal(x["w4"][n], x["w5"][n]) for n in x["w4"])
            print(world,tensor,lora,d,"same",same,"moved",moved,{k:round(v,3) for k,v in x.items() if "_s" in k}, round(y["load_s"],3), round(time.time()-t,1))
    print(tmp)
