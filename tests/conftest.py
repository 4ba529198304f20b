"""The tests run on the CPU, on a machine with GPUs too; `pytest -m cuda` runs those that need one."""

import os

import pytest


def pytest_configure(config):
    """Hide the GPUs, from the processes that tests start as well, before PyTorch looks for them."""
    if config.getoption("markexpr") != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="module", autouse=True)
def memory_is_given_back():
    """Leave the test process's allocator as it is: a run would change it for all later tests, which cannot undo that.

    Processes that tests start keep freed memory as a user's do.
    """
    with pytest.MonkeyPatch.context() as patch:  # modules' fixtures train too
        patch.setattr("training.speed.keep_memory", lambda: None)
        yield
