import threading
import time

from launch.clock import Clock, duration


def test_sleep_is_cut_short_by_the_wish_to_stop_and_later_ones_are_not():
    clock = Clock()
    timer = threading.Timer(0.1, clock.stop)
    timer.start()
    began = time.monotonic()
    clock.sleep(60)
    timer.join()
    assert time.monotonic() - began < 5 and clock.is_stopping
    began = clock.now()
    clock.sleep(0.2)
    assert clock.now() - began >= 0.2


def test_durations_for_people():
    assert [duration(s) for s in (0, 119, 120, 7199, 9000)] == [
        "0 s", "119 s", "2 min", "120 min", "2.5 h",
    ]  # fmt: skip
