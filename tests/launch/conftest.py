import pytest


@pytest.fixture(scope="module")
def server():
    """The service's messages over a real connection; of tests that skip without the client."""
    from fake_tpu import served

    with served() as server:
        yield server
