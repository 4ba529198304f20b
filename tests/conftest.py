"""The tests run on the CPU, on a machine with GPUs too; `pytest -m cuda` runs those that need one."""

import os


def pytest_configure(config):
    """Hide the GPUs, from the processes that tests start as well, before PyTorch looks for them."""
    config.addinivalue_line("markers", "cuda: needs a GPU")
    if config.getoption("markexpr") != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
