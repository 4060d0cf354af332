"""What the planner takes from the tables of a profile that hold the host's time and copies."""

import pytest

from tests.test_profile import PROFILE, predicted
from train.command.planning.profile import Profile


def test_no_work_takes_less_time_than_the_smallest_that_was_measured():
    """What is left of a small layer is the time in which the host starts it."""
    profile = Profile({"layer_float32": [[1e6, 2.0, 4.0], [1e8, 8.0, 8.0]]}, "float32", False)
    smallest = [1e6 / rate for rate in profile.elementwise_rates("layer", 1e6)]
    assert smallest == pytest.approx([1e6 / 2e9, 1e6 / 4e9])
    assert [1e3 / rate for rate in profile.elementwise_rates("layer", 1e3)] == pytest.approx(smallest)
    assert profile.elementwise_rates("layer", 1e9) == pytest.approx((8e9, 8e9))
    for old in ([[1e8, 8.0, 8.0]], [[2.5e7, 8.0, 8.0], [1e8, 8.0, 8.0]]):
        profile = Profile({"layer_float32": old, "loss_float32": [[1e6, 8.0, 8.0], [1e8, 8.0, 8.0]]}, "float32", False)
        for kind in ("layer", "loss"):
            assert profile.elementwise_rates(kind, 1e4) == pytest.approx((8e9, 8e9))


@pytest.mark.parametrize(("kind", "rows", "microbatches"), [("rows", 2, 4), ("sequence", 1, 8)])
def test_messages_of_activations_take_the_times_of_their_own_tables(kind, rows, microbatches):
    """`tp` splits whole sequences where it can, else parts of each, which are copied. Those of `fsdp` are not
    activations."""
    own = {f"{kind}_{name}_float32": [[2, 4096, 5e5]] for name in ("gather", "scatter")}
    line, layers = f"nproc=2 strategy=tp train.micro_batch_size={rows}", 12
    before, after = predicted(line), predicted(line, PROFILE | own)
    assert after.exposed["tp"] > 0.5 * 8 * layers * microbatches > before.exposed["tp"]
    line = f"{line} train.micro_batch_size={3 - rows}"
    assert predicted(line, PROFILE | own).exposed == predicted(line).exposed
    assert predicted("nproc=2 strategy=fsdp", PROFILE | own).total == predicted("nproc=2 strategy=fsdp").total
