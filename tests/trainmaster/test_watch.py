from datetime import UTC, datetime, timedelta
from typing import Any

from gptcore.events import EventBase, Started
from tests.api.server import evaluated, step
from trainmaster.watch import Follower

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def sent(event: EventBase, seconds: float) -> dict[str, Any]:
    """As the API sends it."""
    return event.model_copy(update={"time": BEGAN + timedelta(seconds=seconds)}).model_dump(mode="json")


def test_a_follower_says_loss_speed_and_the_time_left() -> None:
    follower = Follower(20)
    assert follower.numbers() == ""
    started = Started(
        kind="train", device="cpu", device_name="a CPU", world_size=1, versions={}, parameters=1000, total_steps=20
    )
    assert follower.take(sent(started, 0)) == "attempt 0 on a CPU, 1,000 parameters"
    for number in range(1, 11):
        assert follower.take(sent(step(number, 3 - number / 10), 2 * number)) is None
    assert follower.numbers() == "loss 2.000  2,560 tokens/s  0:00:20 left"
    assert follower.take({"type": "status", "to_status": "running"}) is None
    assert follower.take(sent(evaluated(10, 1.5), 21)) == "step 10: loss 2.000  val 1.500  2,560 tokens/s  0:00:20 left"
    follower.take(sent(step(20, float("nan")), 40))
    assert follower.numbers() == "loss nan  val 1.500  2,560 tokens/s"
