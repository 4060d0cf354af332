"""The schema of a run: one dataclass per config group. Values are in `configs/`, rules between fields in `validate.py`.

Torch is not imported here, so that a bad command line is answered at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from train.config.fields import (
    LARGE,
    MAX_COLUMNS,
    MAX_EXPERTS,
    MAX_FIGURE,
    MAX_INT64,
    MAX_LAYERS,
    MAX_SEQUENCES,
    MAX_STEPS,
    MAX_TIMEOUT_S,
    MAX_TOKENS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    number,
)
from train.config.strategy import Strategy


class Precision(Enum):
    """What is computed in what. Parameters, gradients and optimiser state are float64 under `float64`, else float32;
    `bf16` casts weights and activations to bfloat16 for compute and keeps reductions in float32."""

    float64 = "float64"
    float32 = "float32"
    bf16 = "bf16"


class ActivationCheckpointing(Enum):
    none = "none"
    full = "full"  # keep each layer's input only, recompute the rest
    selective = "selective"  # keep the matrix products' and the attention's outputs, recompute the cheap rest


class OnNonfinite(Enum):
    stop = "stop"
    ignore = "ignore"


class Optimiser(Enum):
    adamw = "adamw"
    sgd = "sgd"


class LrSchedule(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class DataSource(Enum):
    python_docs = "python_docs"
    python_source = "python_source"
    text = "text"
    jsonl = "jsonl"
    tokens = "tokens"
    synthetic = "synthetic"


class TokenType(Enum):
    """Of the ids in a token file that has no header; little-endian."""

    auto = "auto"  # told by the file's bytes, or refused
    uint8 = "uint8"
    uint16 = "uint16"
    uint32 = "uint32"
    int32 = "int32"
    int64 = "int64"


class AttentionKernel(Enum):
    sdpa = "sdpa"  # torch's fused kernel
    eager = "eager"  # softmax(QK^T)V written out: slow, readable, any dtype


class ScoreFunction(Enum):
    softmax = "softmax"  # Mixtral, Switch
    sigmoid = "sigmoid"  # DeepSeek-V3


class Balance(Enum):
    """What keeps the experts' loads even."""

    none = "none"
    aux_loss = "aux_loss"  # a loss per sequence, added to the gradient
    bias = "bias"  # loss-free: a bias per expert for the choice alone, moved once per optimiser step


class CompileMode(Enum):
    default = "default"
    reduce_overhead = "reduce-overhead"


class Tracker(Enum):
    """Experiment trackers; each is a package of that name, and an extra."""

    mlflow = "mlflow"
    wandb = "wandb"
    trackio = "trackio"


@dataclass
class ModelConfig:
    name: str = MISSING
    num_layers: int = number(MISSING, ge=1, le=MAX_LAYERS, example=8)
    dim: int = number(MISSING, ge=2, le=MAX_WIDTH, example=128)
    num_heads: int = number(MISSING, ge=1, le=MAX_WIDTH, example=8)
    num_kv_heads: int = number(MISSING, ge=1, le=MAX_WIDTH, example=4)
    ffn_dim: int = number(MISSING, ge=1, le=MAX_COLUMNS, example=352)
    vocab_size: int = number(MISSING, ge=2, le=MAX_VOCABULARY, example=256)
    max_seq_len: int = number(MISSING, ge=1, le=MAX_TOKENS, example=128)
    rope_theta: float = number(10000.0, gt=0, le=LARGE)
    norm_eps: float = number(1e-5, gt=0, le=LARGE)
    init_scale: float = number(0.5, gt=0, le=1e6)  # of 1 / sqrt(columns); GPT-2 small's 0.02 is 0.55 of it
    dropout: float = number(0.0, ge=0, lt=1)
    tie_embeddings: bool = False
    attention: AttentionKernel = AttentionKernel.sdpa
    num_experts: int = number(0, ge=0, le=MAX_EXPERTS)  # 0: every feed-forward is dense; else all are mixtures
    top_k: int = number(2, ge=1, le=MAX_EXPERTS)  # experts per token
    num_shared_experts: int = number(0, ge=0, le=MAX_EXPERTS)  # that every token goes through
    expert_ffn_dim: int = number(0, ge=0, le=MAX_COLUMNS)
    score_function: ScoreFunction = ScoreFunction.sigmoid
    balance: Balance = Balance.none
    aux_loss_coef: float = number(0.01, ge=0, le=1e6)
    bias_update_rate: float = number(0.001, ge=0, le=1e6)


@dataclass
class DataConfig:
    source: DataSource = MISSING
    path: str | None = None  # of data=text, jsonl and tokens: a file, or a folder of texts
    dtype: TokenType = TokenType.auto  # of data=tokens, where the file does not say it
    glob: str | None = None  # of data=text and jsonl: which files of a folder, as *.txt or docs/**/*.md
    field: str | None = None  # of data=jsonl: the field of each line that holds the text
    validation_fraction: float = number(0.1, gt=0, lt=1)
    ignore_token: int | None = None  # targets equal to this id carry no loss


@dataclass
class OptimConfig:
    name: Optimiser = MISSING
    lr: float = number(MISSING, ge=0, le=LARGE, example=1e-3)
    weight_decay: float = number(MISSING, ge=0, le=1e6, example=0.1)
    warmup_steps: int = number(10, ge=0, le=MAX_STEPS)
    schedule: LrSchedule = LrSchedule.cosine
    min_lr_ratio: float = number(0.1, ge=0, le=1)
    beta1: float = number(0.9, ge=0, lt=1)
    beta2: float = number(0.95, ge=0, lt=1)
    eps: float = number(1e-8, gt=0, le=LARGE)
    momentum: float = number(0.0, ge=0, lt=1)


@dataclass
class HardwareConfig:
    """Figures of a device; without them nothing that needs them is logged. `source`: where each figure is from."""

    name: str = MISSING
    match: str | None = None  # how the name that the driver reports ends
    peak_tflops: dict[str, float] = field(default_factory=dict)  # by precision, dense
    memory_gib: float | None = number(None, gt=0, le=MAX_FIGURE)  # as the driver reports it
    memory_gb_per_s: float | None = number(None, gt=0, le=MAX_FIGURE)
    link_gb_per_s: float | None = number(None, gt=0, le=MAX_FIGURE)  # NVLink of a device, all links, in one direction
    price_usd_per_hour: float | None = number(None, ge=0, le=MAX_FIGURE)  # of one device
    grid_gco2_per_kwh: float | None = number(None, ge=0, le=MAX_FIGURE)  # what the power that the devices use emits
    source: dict[str, str] = field(default_factory=dict)


@dataclass
class TrainConfig:
    steps: int = number(100, ge=1, le=MAX_STEPS)
    seed: int = number(1234, ge=0, le=MAX_INT64)
    seq_len: int = number(128, ge=1, le=MAX_TOKENS)
    global_batch_size: int = number(8, ge=1, le=MAX_SEQUENCES)  # sequences per optimiser step, over all ranks
    micro_batch_size: int = number(1, ge=1, le=MAX_SEQUENCES)  # sequences per data rank per forward
    eval_every: int = number(50, ge=0, le=MAX_STEPS)  # 0: only after the last step
    eval_batches: int = number(8, ge=1, le=MAX_SEQUENCES)  # global batches of held-out windows
    clip_norm: float = number(1.0, ge=0, le=LARGE)  # 0: the norm is logged and nothing is clipped
    deterministic: bool = False
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    on_nonfinite: OnNonfinite = OnNonfinite.stop


@dataclass
class CompileConfig:
    enabled: bool = False  # torch.compile, per transformer block and for the loss
    mode: CompileMode = CompileMode.default


@dataclass
class RuntimeConfig:
    device: str = "auto"
    backend: str = "auto"
    timeout_s: float = number(300.0, ge=1, le=MAX_TIMEOUT_S)  # of a collective: a hung rank is an error after this


@dataclass
class MetricsConfig:
    dir: str = "runs"
    warmup_steps: int = number(5, ge=0, le=MAX_STEPS)  # left out of the medians in the summary
    tensorboard: bool = True
    profile_every: int = number(500, ge=0, le=MAX_STEPS)  # from one recorded step to the next; step 10 first; 0: none
    memory_snapshot: bool = False  # of a GPU's allocator, with stacks, at the end; after an out-of-memory error, always
    trace: bool = False  # keep what was recorded, a file per rank, for Perfetto
    trackers: list[Tracker] = field(default_factory=list)  # [mlflow, wandb, trackio]: beside TensorBoard


@dataclass
class Config:
    """Everything that decides a run but the number of processes."""

    strategy: Strategy = MISSING
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    hardware: HardwareConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    precision: Precision = Precision.float32
    compile: CompileConfig = field(default_factory=CompileConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)


@dataclass
class Composed(Config):
    """A config as the command line composes it. `preset`: by dotted key, the values that the chosen presets give."""

    preset: dict[str, Any] = field(default_factory=dict)
