"""The command lines of the snapshot, drawn by a fixed seed from the grammar below. Strings only: nothing of the
product is imported, so that the same lines are drawn before and after a restructure.

Each line of a table is: how many command lines are drawn from it, the tool, the words. `<a|b>` stands for one of its
alternatives. `{port}` is a port that is in use; names of files are those that refusals.py makes.
"""

from __future__ import annotations

import random
import re

SEED = 14
TRIES = 400  # draws of one pattern that are looked through for different lines
NATIVE = "dp|fsdp|zero1|zero2|tp|cp|pp|hsdp|fsdp_tp|fsdp_pp|tp_pp|dp_pp|fsdp_cp|cp_tp"

MESH = f"""
12 local nproc=<3|5|7|9|11> strategy=<hsdp|fsdp_tp|tp_pp|dp_pp|fsdp_cp|cp_tp|fsdp_pp>
5 local nproc=<2|4|8> strategy=tp strategy.tp=<3|5|6|16>
3 local nproc=<2|3|4|8> strategy=single
6 local nproc=<3|5|6|7> strategy=<dp|fsdp|zero1|zero2>
4 local nproc=4 strategy=<dp|dp_pp> strategy.tp=<1|2|4|-1>
5 local nproc=<2|4> strategy=<tp|fsdp_tp|fsdp> strategy.<tp|dp_shard|cp>=<0|-2|-7>
4 local nproc=4 strategy=<fsdp_tp|tp_pp|fsdp_cp> strategy.dp_shard=-1 strategy.<tp|cp>=-1 strategy.pp=null
4 local nproc=4 strategy=<tp|fsdp|dp> strategy.<tp|dp_shard|dp_replicate>=<32769|100000|1000000000>
7 local nproc=<0|-1|none|2.5|1e3|32769|99999999999999999999>
4 local nproc=<8|12|16> strategy=<3d|moe_3d> strategy.<pp|tp>=<3|5|7>
3 local nproc=<8|12|24|20> strategy=4d strategy.<cp|tp>=<3|5>
4 local nproc=4 strategy=<{NATIVE}> strategy.dp_shard=<3|5> strategy.tp=<3|1>
"""
MODEL = """
5 local nproc=4 strategy=tp model.num_heads=<6|10|14> model.num_kv_heads=2 model.dim=<120|240|168>
4 local nproc=<4|8> strategy=<tp|fsdp_tp> strategy.tp=4 model.ffn_dim=<350|353|351|6>
4 local nproc=4 strategy=tp model.num_heads=12 model.dim=<96|120|144|192> model.num_kv_heads=<6|3>
2 local nproc=<16|32> strategy=tp
5 local nproc=1 strategy=dp model.dim=<100|130|17|36> model.num_heads=<8|7|5>
3 local nproc=1 strategy=dp model.num_kv_heads=<3|5|16|6>
3 local nproc=2 strategy=fsdp train.seq_len=<200|256|129> model.max_seq_len=<16|64|127>
3 local nproc=4 strategy=tp model.vocab_size=<5|9|6>
2 local nproc=2 strategy=<dp|fsdp|tp> model.vocab_size=<16|100>
4 local nproc=2 strategy=<dp|tp> data.ignore_token=<300|-1|256|-100>
3 local nproc=1 strategy=dp optim.min_lr_ratio=<2|1.5|1.0001>
2 local nproc=1 strategy=dp hardware=<h100_sxm|l40s> hardware.peak_tflops.float32=<0|-1>
2 local nproc=1 strategy=dp train.seq_len=<1000000|16777216|700000> train.eval_batches=1
"""
BATCH = """
6 local nproc=<2|4> strategy=<dp|fsdp|zero2|hsdp> train.global_batch_size=<7|9|10|6> train.micro_batch_size=<2|4>
3 local nproc=2 strategy=dp train.eval_batches=<10000000|4194304|2100000>
3 local nproc=4 strategy=tp_pp strategy.tp=3 train.global_batch_size=<7|9|11> train.micro_batch_size=2
3 local nproc=<2|4> strategy=<dp|fsdp> train.eval_batches=<100000|200000|300000>
"""
PIPELINE = """
4 local nproc=<4|8> strategy=pp model.num_layers=<1|2|3>
6 local nproc=2 strategy=pp strategy.layers_per_stage=<[5,4]|[8,0]|[3,3,2]|[4]|[9,-1]|[1,1]>
3 local nproc=4 strategy=<dp_pp|fsdp_pp|tp_pp> strategy.layers_per_stage=<[4,5]|[8]|[2,2,2,2]>
4 local nproc=2 strategy=<pp|pp|3d> strategy.schedule=<zigzag|2f2b|1F1B|zbv>
5 local nproc=2 strategy=pp strategy.schedule=<1f1b|gpipe> strategy.stages_per_rank=<2|3|4>
6 local nproc=2 strategy=pp strategy.schedule=<zbv_zero_bubble|dualpipev|looped_bfs> strategy.stages_per_rank=<1|3>
3 local nproc=2 strategy=pp strategy.stages_per_rank=<0|-1|1000000000>
3 local nproc=4 strategy=pp strategy.schedule=<looped_bfs|interleaved_1f1b> model.num_layers=<5|6|7>
3 local nproc=2 strategy=pp strategy.schedule=interleaved_1f1b train.global_batch_size=<3|5|7>
3 local nproc=2 strategy=pp strategy.schedule=<dualpipev|zbv_zero_bubble> train.global_batch_size=<1|2>
2 local nproc=4 strategy=pp train.global_batch_size=<1|2|3>
2 local nproc=2 strategy=pp strategy.schedule=<zbv_zero_bubble|dualpipev> compile.enabled=true
2 local nproc=4 strategy=dp_pp strategy.schedule=<interleaved_zero_bubble|zbv_zero_bubble|dualpipev>
2 local nproc=4 strategy=fsdp_pp strategy.schedule=<looped_bfs|interleaved_1f1b> strategy.reshard_after_forward=true
2 local nproc=<4|8> strategy=<fsdp_pp|tp_pp|3d> strategy.zero_stage=<2|3>
2 local nproc=<1|2> strategy=<pp|dp_pp> strategy.pp=null
"""
TECHNIQUES = """
3 local nproc=4 strategy=<cp|cp_tp> strategy.cp_method=<zigzag|megatron|Ring>
3 local nproc=4 strategy=<cp|fsdp_cp> train.seq_len=<100|101|130|66>
3 local nproc=8 strategy=<cp|cp_tp> strategy.cp_method=ulysses
2 local nproc=8 strategy=cp_tp strategy.tp=4 train.seq_len=<4|68>
2 local nproc=4 strategy=dp strategy.cp=2 strategy.tp=<2|1>
3 local nproc=2 strategy=dp strategy.comm_hook=<gzip|int8|FP16>
5 local nproc=2 strategy=<fsdp|zero1|tp|pp> strategy.comm_hook=<fp16|bf16|powersgd>
4 local nproc=2 strategy=<dp|tp|cp|pp> strategy.cpu_offload=true strategy.cp=null
4 local nproc=2 strategy=<tp|dp> strategy.zero_stage=<1|2>
4 local nproc=2 strategy=<fsdp|zero1|zero2> strategy.zero_stage=<0|4|7|-1>
5 local nproc=2 strategy=dp strategy.<bucket_mb|powersgd_rank>=<0|-1|1e308|nan|10000000>
2 local nproc=2 strategy=dp strategy.powersgd_start_step=<0|1|-3>
3 local nproc=2 strategy=<tp|fsdp|fsdp_tp> strategy.async_tp=true
2 local nproc=2 strategy=tp strategy.async_tp=true compile.enabled=true runtime.<device=cpu|backend=gloo>
1 local nproc=2 strategy=tp strategy.async_tp=true compile.enabled=true strategy.sequence_parallel=false
"""
EXPERTS = """
4 local nproc=4 strategy=ep model=moe_tiny strategy.ep=<3|0|-2|100000|8>
3 local nproc=4 strategy=ep model=moe_tiny model.num_experts=<6|7|10>
2 local nproc=<2|4> strategy=ep model=<tiny|small>
2 local nproc=8 strategy=moe_3d model=<tiny|small>
2 local nproc=4 strategy=<dp|tp> model=moe_tiny strategy.ep=<2|4>
2 local nproc=4 strategy=ep model=moe_tiny train.activation_checkpointing=selective strategy.ep=<2|4>
3 local nproc=2 strategy=<dp|fsdp> model=moe_tiny model.top_k=<9|20|65537>
2 local nproc=2 strategy=<dp|fsdp> model=moe_tiny model.expert_ffn_dim=0
3 local nproc=2 strategy=<dp|tp|pp> model.num_shared_experts=<1|2>
2 local nproc=4 strategy=tp model=moe_tiny model.expert_ffn_dim=<110|113>
"""
DEEPSPEED = """
3 local nproc=2 strategy=<ds_zero1|ds_zero2|ds_zero3|ds_pp> precision=float64
2 local nproc=2 strategy=ds_autotp precision=<float64|bf16>
3 local nproc=2 strategy=<ds_zero1|ds_zero2|ds_zero3> strategy.zero_stage=<0|4>
2 local nproc=2 strategy=ds_pp strategy.zero_stage=<2|3>
3 local nproc=2 strategy=<ds_zero1|ds_zero2> strategy.<dp_replicate=2|dp_shard=null>
1 local nproc=2 strategy=ds_pp strategy.offload_optimizer=true
1 local nproc=2 strategy=ds_pp model.tie_embeddings=true
2 local nproc=4 strategy=ds_autotp strategy.pp=<2|1>
1 local nproc=2 strategy=ds_autotp train.activation_checkpointing=selective
2 local nproc=2 strategy=<ds_autotp|ds_zero3> compile.enabled=true
3 local nproc=2 strategy=<ds_zero1|ds_zero3|ds_autotp> model=moe_tiny
2 local nproc=<3|5|16> strategy=ds_autotp
"""
KEYS = """
6 local strategy=dp train.<steps|global_batch_size|micro_batch_size|seq_len|eval_batches>=<0|-5|10000000000>
5 local strategy=dp train.<seed|eval_every|clip_norm>=<-1|18446744073709551616|nan|inf>
6 local strategy=dp model.<num_layers|dim|num_heads|ffn_dim|vocab_size>=<0|-1|1000000000>
4 local strategy=dp optim.<lr|weight_decay|eps>=<-1|nan|inf|1e308>
4 local strategy=dp optim.<beta1|beta2>=<1|-0.1|2>
3 local strategy=dp <model.dropout|data.validation_fraction|model.norm_eps>=<1.5|-1|nan>
3 local strategy=dp runtime.timeout_s=<0|1e-9|1e308|-3>
3 local strategy=dp metrics.<warmup_steps|profile_every>=<-1|10000000000>
7 local strategy=dp train.<steps|seed|seq_len|eval_every>=<abc|1.5|true|null|[1,2]|1e3|1_0x>
4 local strategy=dp optim.lr=<fast|[1]|true|null> train.steps=3
4 local strategy=dp <train.deterministic|compile.enabled|metrics.tensorboard>=<maybe|3.5|null>
6 local strategy=dp <precision|optim.schedule|optim.name|model.attention|model.balance|data.source>=<fp7|step|3>
3 local strategy=dp train.<activation_checkpointing|on_nonfinite>=<some|halt>
8 local <train.stepss|+train.stepss|optim.learning_rate|model.layers|lr|nprocs|metrics.folder|data.file>=4
4 local +strategy.<typo|tp_degree|degree|zero>=1
5 local nproc=2 strategy=<tp|dp|fsdp> strategy.<schedule|stages_per_rank|layers_per_stage>=<gpipe|2|[4,4]>
4 local nproc=2 strategy=<ds_zero1|ds_pp> strategy.<comm_hook|cp|sequence_parallel|bucket_mb>=1
3 local nproc=2 strategy=<tp|dp|pp> strategy.<offload_optimizer|whole_below>=true
4 local ~<strategy|train.steps|model.dim|optim>
3 local <train|model|optim>=<3|abc>
10 local nproc=2 <strategy|model|data|optim|hardware>=<foo|tinny|adam|fsdpp|h100|null|3>
8 local train.steps=<${nope}|${train}|${oc.env:NO_SUCH_NAME}|${train.seed|${oc.decode:'1e400'}|${.}|${model.name}|$>
2 local strategy.name=<${oc.env:HOME}|a/b|../x>
6 local <=|train.steps|train.steps=[|a@b=c|.=1|strategy@x=tp|train.steps=(1|optim.lr=1:2>
6 local <-x|--frobnicate|-m|--cfg=all|--multirun|--strategy=tp> strategy=dp
5 local <train.steps=1,2|strategy=dp,tp|train.seed=range(1,4)|train.steps=choice(1,2)|optim.lr=interval(0,1)>
4 local <force=perhaps|force=1|port=0|port=99999|port=abc|port={port}>
2 local metrics.trackers=<[pigeon]|pigeon|[1]>
1 local train.steps=1000000000000000000000000000000000000000000000000000000000000000000000000000000
"""
DATA = """
4 local nproc=<1|2> strategy=dp data=<text|jsonl|tokens>
4 local strategy=dp data=<text|jsonl|tokens> data.path=<no/such/file|nowhere>
4 local strategy=dp data=<text|jsonl|tokens> data.path=empty.txt
3 local strategy=dp data=<text|jsonl> data.path=<short.txt|short.jsonl>
3 local strategy=dp data=text data.path=<packed.gz|array.npy|lines.jsonl|page.pdf>
3 local strategy=dp data=tokens data.path=<packed.gz|long.txt|folder|matrix.npy|floats.npy>
2 local strategy=dp data=tokens data.path=<foreign.bin|foreign.npy> data.dtype=<auto|uint16>
3 local strategy=dp data=tokens data.path=array.npy data.dtype=<uint32|int64|uint8>
2 local strategy=dp data=text data.path=same.txt data.ignore_token=97 nproc=<1|2>
3 local strategy=dp data=<python_docs|synthetic|python_source> data.path=<long.txt|lines.jsonl|array.npy>
3 local strategy=dp data=<python_docs|synthetic|tokens> data.glob=<*.txt|docs/*.md> data.path=<null|array.npy>
3 local strategy=dp data=<text|python_docs> data.field=<text|body> data.path=<null|long.txt>
2 local strategy=dp data=<text|synthetic> data.dtype=<uint16|int64> data.path=<null|long.txt>
3 local strategy=dp data=jsonl data.path=lines.jsonl data.field=<body|nope|number>
2 local strategy=dp data=jsonl data.path=<broken.jsonl|list.jsonl>
1 local strategy=dp data=jsonl data.path=lines.jsonl data.field=null
2 local strategy=dp data=text data.path=<folder|folder/inner> data.glob=<*.md|x/**/*.py>
1 local strategy=dp data=text data.path=long.txt data.glob=*.txt
3 local nproc=4 strategy=<cp|tp|fsdp_cp> data=text data.path=middle.txt train.seq_len=<1024|4096>
"""
PLACES = """
3 local strategy=dp <metrics.dir|data.path>=<s3://bucket/x|gs://a/b|file:///x> data=text
3 local strategy=dp metrics.dir=<short.txt|short.txt/inner|/proc/x>
2 local strategy=dp runtime.device=<teapot|kettle|cuda:99>
2 local strategy=dp runtime.backend=<pigeon|smoke>
2 local strategy=<dp|fsdp> nproc=8 model=llama_70b train.global_batch_size=16 runtime.device=<cpu|auto>
"""
OTHERS = """
4 explain strategy=dp,<foo|fsdpp|tpp> nproc=<2|4>
3 explain strategy=<dp|tp|pp>,single nproc=<2|4>
2 explain strategy=tp nproc=<2,0|4,x|3,2>
2 explain train.seed=<range(1,100000000000)|range(1,5000)>
3 explain strategy=<dp|fsdp|tp> nproc=8 model=llama_70b hardware=<h100_sxm|l40s> train.global_batch_size=16
4 explain nproc=<3|5|6> strategy=<dp|tp_pp|3d|pp>
2 explain strategy=pp strategy.schedule=<zigzag|2f2b> nproc=2
2 explain strategy=dp train.steps=<0|abc|nan>
2 explain <strategy=foo|train.stepss=3|-m|batch=micro|metrics.dir=short.txt>
4 sweep strategy=<dp|fsdp|tp>,<single|foo> nproc=2
2 sweep strategy=dp,tp nproc=2,<3|0|x>
3 sweep strategy=dp,fsdp nproc=2 batch=<mini|all|micro,best>
2 sweep strategy=dp max_micro_batch_size=<0|x>
2 sweep strategy=dp <fresh|skip_invalid|force>=<maybe|2>
2 sweep strategy=dp train.global_batch_size=8,16 batch=<micro|best>
2 sweep strategy=dp,tp nproc=2 <--cfg=job|-m|metrics.dir=a,b|train.seed=range(1,5000)>
2 sweep strategy=pp nproc=2 strategy.schedule=<1f1b,zigzag|gpipe,dualpipev> strategy.stages_per_rank=1
2 sweep strategy=dp nproc=2 data=text data.path=<nowhere|empty.txt>
3 main strategy=<foo|dp> train.steps=<0|abc>
3 main <nproc=2|train.stepss=3|-m|optim.lr=nan|strategy=pp> strategy.pp=3
"""
VALID = f"""
6 local nproc=4 strategy=<hsdp|fsdp_tp|tp_pp|dp_pp|fsdp_cp|cp_tp|fsdp_pp>
4 local nproc=2 strategy=<tp|fsdp|dp|cp|pp|zero1> train.seq_len=<64|256>
3 local nproc=16 strategy=<3d|4d|moe_3d> model=moe_tiny
2 local nproc=2 strategy=pp strategy.pp=2 strategy.dp_shard=-1 model.num_layers=<3|4>
2 local nproc=<1|2> strategy=tp strategy.loss_parallel=false
2 local nproc=2 strategy=dp strategy.comm_hook=<fp16|none|bf16>
3 local nproc=2 strategy=pp strategy.schedule=<gpipe|interleaved_1f1b|zbv_zero_bubble|dualpipev>
3 local nproc=4 strategy=<ep|fsdp|tp> model=moe_tiny
3 local nproc=2 strategy=<ds_zero1|ds_zero2|ds_zero3|ds_pp|ds_autotp>
2 local strategy=dp data=text data.path=<long.txt|folder>
2 local strategy=dp train.seq_len=16 data=<jsonl data.path=lines.jsonl|tokens data.path=array.npy>
3 explain strategy=dp,<fsdp|tp|pp> nproc=2,4
14 explain nproc=4 strategy=<{NATIVE}>
5 explain nproc=4 strategy=<ds_zero1|ds_zero2|ds_zero3|ds_pp|ds_autotp>
3 explain nproc=16 strategy=<3d|4d|fsdp_tp> train.global_batch_size=16
3 explain nproc=8 model=moe_tiny strategy=<ep|moe_3d|fsdp>
1 explain strategy=single model.tie_embeddings=true
12 explain nproc=8 strategy=<3d|{NATIVE}> model=llama_8b hardware=h200_sxm precision=bf16
6 explain nproc=4 strategy=pp strategy.schedule=<gpipe|interleaved_1f1b|looped_bfs|zbv_zero_bubble|dualpipev>
2 explain nproc=4 strategy=<tp|tp_pp> strategy.sequence_parallel=false
1 explain nproc=4 strategy=tp strategy.loss_parallel=false
4 explain nproc=4 strategy=<cp|cp_tp> strategy.cp_method=<ring|ulysses>
4 explain nproc=4 strategy=<fsdp|hsdp|fsdp_tp> strategy.<reshard_after_forward=false|cpu_offload=true>
2 explain nproc=4 strategy=<dp_pp|fsdp_pp> strategy.stages_per_rank=2 strategy.schedule=looped_bfs
2 explain nproc=2 strategy=<dp|tp|pp> model.tie_embeddings=true optim=sgd
"""


def drawn(table: str, draw: random.Random) -> list[str]:
    """The command lines of a table: the given number of different ones for each pattern, or all if there are fewer."""
    lines: dict[str, None] = {}
    for row in table.strip().splitlines():
        count, pattern = row.split(maxsplit=1)
        found: dict[str, None] = {}
        for _ in range(TRIES):
            if len(found) == int(count):
                break
            found[one(pattern, draw)] = None
        lines |= found
    return [*lines]


def one(pattern: str, draw: random.Random) -> str:
    return re.sub(r"<([^>]*)>", lambda choices: draw.choice(choices[1].split("|")), pattern)


def bad_lines() -> list[str]:
    draw = random.Random(SEED)
    tables = (MESH, MODEL, BATCH, PIPELINE, TECHNIQUES, EXPERTS, DEEPSPEED, KEYS, DATA, PLACES, OTHERS)
    return [*dict.fromkeys(line for table in tables for line in drawn(table, draw))]


def valid_lines() -> list[str]:
    """Lines that are accepted, and must still be accepted."""
    return drawn(VALID, random.Random(SEED))
