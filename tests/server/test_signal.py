"""A change wakes all who wait for it, and none who looked after it."""

from __future__ import annotations

import asyncio

from fed_server.rounds.signal import Signal


async def test_a_change_wakes_everybody_at_once() -> None:
    signal = Signal()
    waiting = [asyncio.create_task(signal.wait(signal.count, 60)) for _ in range(3)]
    await asyncio.sleep(0)
    signal.notify()
    assert await asyncio.gather(*waiting) == [1, 1, 1]


async def test_a_change_between_look_and_wait_is_not_missed() -> None:
    signal = Signal()
    seen = signal.count
    signal.notify()
    assert await signal.wait(seen, 60) == 1


async def test_without_a_change_the_wait_ends_at_its_timeout() -> None:
    signal = Signal()
    signal.notify()
    assert await signal.wait(1, 0.01) == 1
    assert await signal.wait(1, 0) == 1
    assert await signal.wait(1, -5) == 1


async def test_one_who_gives_up_does_not_disturb_the_others() -> None:
    signal = Signal()
    quitter, patient = [asyncio.create_task(signal.wait(0, 60)) for _ in range(2)]
    await asyncio.sleep(0)
    quitter.cancel()
    await asyncio.sleep(0)
    signal.notify()
    assert await patient == 1
    assert quitter.cancelled()


async def test_two_changes_are_two_wake_ups() -> None:
    signal = Signal()
    signal.notify()
    waiting = asyncio.create_task(signal.wait(1, 60))
    await asyncio.sleep(0)
    signal.notify()
    assert await waiting == 2
