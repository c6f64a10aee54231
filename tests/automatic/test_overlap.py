from concurrent.futures import ThreadPoolExecutor

import pytest

from sam_jax.automatic.overlap import one_ahead, one_behind


def test_one_ahead():
    """An item is produced while the previous one is processed."""
    with ThreadPoolExecutor(1) as host:
        assert list(one_ahead(iter("abc"), host)) == ["a", "b", "c"]
        assert list(one_ahead(iter(()), host)) == []


def test_one_behind():
    events = []

    def items():
        for item in (1, 2):
            events.append(f"made {item}")
            yield item
        raise ValueError("no third")

    behind = one_behind(items())
    events += [f"got {next(behind)}", f"got {next(behind)}"]
    with pytest.raises(ValueError, match="no third"):
        next(behind)
    assert events == ["made 1", "made 2", "got 1", "got 2"]
    assert list(one_behind(iter([1, 2, 3]))) == [1, 2, 3]
