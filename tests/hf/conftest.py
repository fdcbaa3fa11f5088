"""Fixtures of tests that patch models."""

import pytest
import torch


@pytest.fixture
def fresh_dynamo():
    """Nothing compiled before counts, or remains."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
