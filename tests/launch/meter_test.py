from launch.meter import Meter


def test_machines_before_these_count_and_none_does_twice():
    meter = Meter()
    meter.carry(3600)
    assert meter.see("a", 1000, 16, 1100) == 1600
    meter.see("a", 1000, 16, 1200)
    meter.carry(9999)
    assert meter.chip_seconds == 3600 + 3200
    meter.begin()
    meter.see("a", 5000, 16, 5010)
    meter.carry(6800)  # As these machines have it.
    assert meter.chip_seconds == 6800 + 160 and meter.chip_hours == 6960 / 3600


def test_of_a_new_job_nothing_is_before():
    meter = Meter()
    meter.begin()
    meter.carry(100)
    assert meter.see("a", 10, 4, 5) == 0  # By another clock.
    assert meter.chip_seconds == 0
