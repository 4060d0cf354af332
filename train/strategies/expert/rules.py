"""The rules of expert parallelism."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.rule import Finding, Rule, degree_fixes, divisors, nearest, no_selective_recomputation
from train.config.strategy import folded_ranks

NUM_DEGREES = 4  # the number of degrees that are tried as fixes


def ranks_of(plan: Plan) -> tuple[int, int]:
    """(ep, the number of ranks that it folds over); ep is 1 if the strategy names none or an invalid one."""
    return plan.ep, folded_ranks(plan.degrees)


def ep_degree(plan: Plan) -> Finding | None:
    ep = plan.config.strategy.expert_degree()
    if ep is None or ep >= 1 or ep == -1:
        return None
    message = f"strategy.ep={ep} is not a valid degree (a positive number, or -1 for all ranks)"
    return Finding(message, ("strategy.ep=-1", "strategy.ep=1"))


def ep_needs_experts(plan: Plan) -> Finding | None:
    ep, model = plan.config.strategy.expert_degree(), plan.config.model
    if ep is None or model.num_experts > 0:
        return None
    # `validate` cannot try another model preset as a fix, so the message names one
    message = f"strategy.ep={ep} splits experts, but model={model.name} has none (model=moe_tiny has some)"
    return Finding(message, ("strategy.ep=null",), "use a model with experts")


def ep_needs_fsdp(plan: Plan) -> Finding | None:
    ep = plan.config.strategy.expert_degree()
    if ep is None or "dp_shard" in plan.axes:
        return None
    degree = plan.axes.get("dp_replicate")
    moved = () if degree is None else (f"strategy.dp_replicate=null strategy.dp_shard={degree}",)
    message = f"strategy.ep={ep} folds over strategy.dp_shard, which strategy={plan.config.strategy.name} does not name"
    return Finding(message, (*moved, "strategy.dp_shard=1", "strategy.ep=null"))


def ep_fixes(plan: Plan) -> tuple[str, ...]:
    """Other degrees, sorted by their distance from this one."""
    ep, folded = ranks_of(plan)
    return tuple(f"strategy.ep={degree}" for degree in nearest(divisors(folded), ep))


def rank_fixes(plan: Plan) -> tuple[str, ...]:
    """Lines that give `dp_shard` other degrees which split experts evenly, sorted by their distance from this one."""
    model, cp = plan.config.model, plan.degrees["cp"]
    if plan.config.strategy.expert_degree() == -1:
        folded = divisors(model.num_experts)
    else:
        folded = [plan.ep * sharing for sharing in divisors(model.dim)]
    degrees = nearest([ranks // cp for ranks in folded if ranks % cp == 0], plan.degrees["dp_shard"])
    return degree_fixes(plan, "dp_shard", degrees[:NUM_DEGREES])


def ep_ranks(plan: Plan) -> Finding | None:
    ep, folded = ranks_of(plan)
    if folded % ep == 0:
        return None
    axes = "strategy.dp_shard" + (" x strategy.cp" if plan.degrees["cp"] > 1 else "")
    message = f"{axes}={folded} is not divisible by strategy.ep={ep}"
    return Finding(message, (*ep_fixes(plan), *rank_fixes(plan)), "use another number of processes")


def ep_experts(plan: Plan) -> Finding | None:
    (ep, _), experts = ranks_of(plan), plan.config.model.num_experts
    if experts % ep == 0:
        return None
    more = (experts // ep + 1) * ep
    message = f"model.num_experts={experts} is not divisible by strategy.ep={ep}"
    return Finding(message, (*ep_fixes(plan), *rank_fixes(plan), f"model.num_experts={more}"), "use strategy.ep=1")


def ep_width(plan: Plan) -> Finding | None:
    (ep, folded), dim = ranks_of(plan), plan.config.model.dim
    if plan.config.strategy.expert_degree() is None or folded % ep or dim % (folded // ep) == 0:
        return None
    message = f"model.dim={dim} is not divisible by the {folded // ep} ranks that share an expert"
    return Finding(message, (*ep_fixes(plan), *rank_fixes(plan)), "use another number of processes")


def ep_checkpointing(plan: Plan) -> Finding | None:
    ep = plan.config.strategy.expert_degree()
    return None if ep is None else no_selective_recomputation(plan, f"strategy.ep={ep}")


RULES = (
    Rule("ep_degree", "a degree is a number of ranks", ep_degree),
    Rule("ep_needs_experts", "expert parallelism needs a model with experts", ep_needs_experts),
    Rule("ep_needs_fsdp", "ep folds over the ranks over which FSDP shards dense weights", ep_needs_fsdp),
    Rule("ep_ranks", "ep must divide the number of ranks over which FSDP shards", ep_ranks),
    Rule("ep_experts", "every rank needs the same number of whole experts", ep_experts),
    Rule("ep_width", "the ranks that share an expert must split its width evenly", ep_width),
    Rule(
        "ep_checkpointing",
        "selective recomputation must repeat the same operators, but the experts' own FSDP adds others",
        ep_checkpointing,
    ),
)
