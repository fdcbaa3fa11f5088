"""What several tests of patched models watch."""

import pytest

from llmjepa_kernels.hf import layer


@pytest.fixture
def sparse_calls(monkeypatch):
    """The calls of view_attention, as their keyword arguments."""
    calls = []

    def spy(q, k, v, visible_until, **options):
        calls.append(options)
        return view_attention(q, k, v, visible_until, **options)

    view_attention = layer.view_attention
    monkeypatch.setattr(layer, "view_attention", spy)
    return calls
