import asyncio
import contextlib
import threading

import pytest
from starlette.exceptions import HTTPException

from sam_jax.demo.limits import Shares, Turns, Worker


def test_shares_are_limited_in_total_and_for_each():
    shares = Shares(3, 2, 1)
    with contextlib.ExitStack() as held:
        held.enter_context(shares.take("home", "ann"))
        for who in (("home", "ann"), ("office", "ann")):
            with pytest.raises(HTTPException, match="busy"), shares.take(*who):
                pass
        held.enter_context(shares.take("home", "bob"))
        with pytest.raises(HTTPException), shares.take("home", "eve"):
            pass
        held.enter_context(shares.take("office", "eve"))
        with pytest.raises(HTTPException), shares.take("elsewhere", "joe"):
            pass
    with shares.take("home", "ann"):  # the shares were given back
        pass


def test_a_share_is_given_back_after_an_error():
    shares = Shares(1, 1)
    with pytest.raises(ValueError, match="broken"), shares.take("ann"):
        raise ValueError("broken")
    with shares.take("ann"):
        pass


def test_work_in_steps_waits_for_all_others():
    turns, waited = Turns(), threading.Event()

    def step():
        turns.wait(60)
        waited.set()

    thread = threading.Thread(target=step)
    with turns.first(), turns.first():
        thread.start()
        assert not waited.wait(0.2)
    thread.join(60)
    assert waited.is_set()


def test_a_worker_does_one_thing_at_a_time_in_order():
    done, begun, free = [], threading.Event(), threading.Event()

    def first():
        begun.set()
        free.wait(60)
        done.append("first")

    async def ask():
        worker = Worker()
        one = asyncio.create_task(worker.run(first))
        await asyncio.to_thread(begun.wait, 60)
        left = asyncio.create_task(worker.run(done.append, "left"))
        last = asyncio.create_task(worker.run(done.append, "last"))
        await asyncio.sleep(0.1)
        assert done == []
        left.cancel()  # before its turn, so it never runs
        free.set()
        await asyncio.gather(one, last)
        worker.close()

    asyncio.run(ask())
    assert done == ["first", "last"]
