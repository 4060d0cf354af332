"""The routers' choices in the proof: a strategy uses the reference's choice where rounding decides.

Two experts may have nearly the same score. Then a rounding error decides between them, and everything after this choice
differs, also if the strategy is right. So the reference records its choices, and a strategy uses the recorded choice of
a token ("replays" it) if, by the strategy's own scores, it is the best choice within LEAST_MARGIN. Elsewhere a strategy
uses its own choice. The choices that were used are compared with the reference's, so a wrong router is seen.

Shapes: B batch, T sequence, E experts, K experts per token, L layers. A choice is a row of K numbers of experts.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from train.config.schema import Config, Precision
from train.model.moe import routers
from train.model.spans import Work
from train.model.transformer import Transformer
from train.proof.comparison import Named
from train.ranks.distributed import own_device, own_rows, sum_over
from train.strategies.context.apply import positions_of
from train.strategies.expert.balance import TOKEN_AXES

# If two scores, which are between 0 and 1, are closer than this, rounding may decide between their experts. So it must
# be at least twice the difference between a score of a correct strategy and of one device. The largest differences, in
# all steps of `moe_tiny` with train.seq_len=64 under tp, cp and ep on 2 CPU processes, are 2.1e-14, 1.1e-5 and 1.0e-2.
# In a first step they are 4.4e-16, 2.4e-7 and 5.1e-3: AdamW makes them grow. In bf16 no score of a replaced expert was
# more than 3.9e-3 above one of the reference's.
LEAST_MARGIN = {Precision.float64: 1e-8, Precision.float32: 1e-4, Precision.bf16: 3e-2, Precision.fp8: 3e-2}


class Routing:
    """The choices of one device, or of a strategy that is compared with it, in all phases of a collection.

    `work`: a watcher that runs during the whole collection. `reference`: what `collect` returned on one device; it is
    empty on one device itself. Call `attach` for each model, `phase` before each step or evaluation, which must use the
    global batch once, and `collect` and `facts` at the end. For a dense model all of them do nothing.
    """

    def __init__(self, config: Config, mesh: DeviceMesh, work: Work, reference: Named) -> None:
        self.config, self.mesh, self.work, self.reference = config, mesh, work, reference
        self.device, self.rows = own_device(mesh), own_rows(mesh, config.train.global_batch_size)
        cp = mesh["cp"]
        self.positions = positions_of(cp.get_local_rank(), cp.size(), config.train.seq_len).to(self.device)
        self.layers: list[int] = []  # those of this rank
        self.now = ""
        # by phase and layer, for this rank's rows and positions, in the order in which the forward used the experts
        self.used: dict[str, dict[int, Tensor]] = {}
        self.expected: dict[int, Tensor] = {}  # the reference's choices in this phase, by layer
        self.num_rows: dict[int, int] = {}  # forwarded in this phase outside the watched work, by layer
        self.counts = torch.zeros(2, dtype=torch.long, device=self.device)  # replayed, all

    def attach(self, model: Transformer) -> None:
        """Route the model's tokens, from now on, by this object."""
        own = routers(model.layers)
        self.layers = list(own)
        for layer, router in own.items():
            # not compiled: what it does depends on the microbatch, and the compiler would compile each anew
            router.on_choice = torch.compiler.disable(partial(self.choose, layer))

    def detach(self, model: Transformer) -> None:
        """Let the model's routers choose by themselves again."""
        for router in routers(model.layers).values():
            router.on_choice = None

    def phase(self, name: str) -> None:
        """Begin a phase, for example "step 1"."""
        shape = (self.rows.stop - self.rows.start, len(self.positions), self.config.model.top_k)
        self.now, self.num_rows = name, dict.fromkeys(self.layers, 0)
        self.used[name] = {i: torch.zeros(shape, dtype=torch.long, device=self.device) for i in self.layers}
        if self.reference:
            whole = {i: self.reference[f"{name} {router_name(i)}"] for i in self.layers}
            self.expected = {i: x[self.rows].to(self.device)[:, self.positions] for i, x in whole.items()}

    def choose(self, layer: int, ranked_BTE: Tensor, own_BTK: Tensor) -> Tensor:
        """The choices to use, for the microbatch that runs now. A recomputed forward gets those of the original."""
        used, rows = self.used[self.now][layer], self.microbatch(layer, len(own_BTK))
        if not in_backward():
            used[rows] = self.decide(layer, rows, ranked_BTE, own_BTK)
        # a copy, because autograd keeps it; also in a forward, because torch's selective recomputation raises if a
        # recomputation runs an operator that the forward did not run
        return used[rows].clone()

    def decide(self, layer: int, rows: slice, ranked_BTE: Tensor, own_BTK: Tensor) -> Tensor:
        """Each token's own choice, or the reference's where rounding decides; sorted, because rounding also decides the
        order of two equally good experts, and the search compares what each of a token's choices gives."""
        own_BTK = own_BTK.sort(-1).values
        self.counts[1] += own_BTK[..., 0].numel()
        if not self.expected:
            return own_BTK
        expected_BTK = self.expected[layer][rows]
        replayed_BT = is_within_rounding(ranked_BTE, own_BTK, expected_BTK, LEAST_MARGIN[self.config.precision])
        self.counts[0] += replayed_BT.sum()
        return torch.where(replayed_BT.unsqueeze(-1), expected_BTK, own_BTK)

    def microbatch(self, layer: int, size: int) -> slice:
        """Which of this rank's rows run now. A loop that does not say so must run them in order, and each backward
        before the next forward."""
        if self.work.kind is not None:
            start = self.work.microbatch * self.config.train.micro_batch_size
        else:
            before = in_backward()
            start = self.num_rows[layer] - (size if before else 0)
            self.num_rows[layer] = start + size
        return slice(start, start + size)

    def collect(self) -> Named:
        """The choices of the global batch [B, T, K], each sorted, by phase and router. Collective over the token axes
        and `pp`."""
        model, train = self.config.model, self.config.train
        record: Named = {}
        for phase, of_layer in self.used.items() if model.num_experts > 0 else ():
            shape = (model.num_layers, train.global_batch_size, train.seq_len, model.top_k)
            chosen = torch.zeros(shape, dtype=torch.long, device=self.device)
            for layer, used in of_layer.items():
                chosen[layer, self.rows][:, self.positions] = used
            sum_over(chosen, self.mesh, "pp", *TOKEN_AXES)
            record |= {f"{phase} {router_name(layer)}": x.cpu() for layer, x in enumerate(chosen)}
        return record

    def facts(self) -> dict[str, int]:
        """`choices`: of every token in every layer and phase. `replayed`: those of the reference that replaced another
        one. Collective as `collect` is."""
        if self.config.model.num_experts == 0:
            return {}
        replayed, choices = sum_over(self.counts.clone(), self.mesh, "pp", *TOKEN_AXES).tolist()
        return {"replayed": replayed, "choices": choices}


def is_within_rounding(ranked_BTE: Tensor, own_BTK: Tensor, expected_BTK: Tensor, margin: float) -> Tensor:
    """Whether a token's expected choice differs from its own, and yet is the best one if each score may change by half
    the margin: no expert outside of it is more than the margin above an expert in it. Returns BT."""
    differs_BT = (own_BTK.sort(-1).values != expected_BTK.sort(-1).values).any(-1)
    worst_BT = ranked_BTE.gather(-1, expected_BTK).amin(-1)
    others_BT = ranked_BTE.scatter(-1, expected_BTK, -torch.inf).amax(-1)
    return differs_BT & (others_BT - worst_BT <= margin)


def router_biases(model: Transformer, mesh: DeviceMesh, config: Config) -> Named:
    """The routers' biases of all layers, if they have some. Collective over `pp`."""
    own = {layer: router.bias for layer, router in routers(model.layers).items() if router.bias is not None}
    if not own:
        return {}
    any_bias = next(iter(own.values()))
    biases = any_bias.new_zeros(config.model.num_layers, config.model.num_experts)
    for layer, bias in own.items():
        biases[layer] = bias
    return {f"{router_name(i)}.bias": bias.cpu() for i, bias in enumerate(sum_over(biases, mesh, "pp"))}


def router_name(layer: int) -> str:
    return f"layers.{layer}.feed_forward.router"


def in_backward() -> bool:
    """Whether autograd runs a backward, so that a forward now is a recomputation. torch has no public function for it
    (tried on 2.13); `torch.utils.checkpoint` uses this one too."""
    return bool(torch._C._current_graph_task_id() != -1)
