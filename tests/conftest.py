"""Triton's interpreter must be chosen before anything imports triton."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("LLMJEPA_COARSE_MATH"):
    from tests.support.coarse_math import make_coarse

    make_coarse()

# Workers of pytest-xdist share the cores.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // workers))


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """With a GPU, what runs Triton's kernels runs natively and is part of `-m gpu`."""
    for item in items:
        if torch.cuda.is_available():
            if item.get_closest_marker("triton"):
                item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="module")
def one_thread():
    """Tiny models run many small operations, which threads that wait on each other only slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_dynamo():
    """Nothing compiled before counts, or remains."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Whole files, which share fixtures, in their order: those of few long tests are not last."""
    if torch.cuda.is_available():  # many cores compile for one GPU: single tests, as --dist says
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)
