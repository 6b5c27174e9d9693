"""Where offers and receivers meet."""

import asyncio
from collections.abc import Callable

import pytest

from shared.errors import PeerGone, TransferTimeout
from shared.transport.inbox import Inbox, Offer
from shared.transport.piece import PieceHeader, PieceKind

A, B = 1 << 20, 2 << 20


class FakeOffer(Offer):
    """Remembers whether it was refused."""

    def __init__(
        self, transfer_id: int, piece: int = 0, *, inline: bytes | None = None, link: object = "l"
    ) -> None:
        header = PieceHeader(transfer_id=transfer_id, piece=piece, kind=PieceKind.KV)
        super().__init__(header, None if inline is None else memoryview(inline), link)
        self.is_refused = False

    async def accept(self, buffer: memoryview) -> None:
        raise AssertionError("nobody asked for the payload")

    def refuse(self) -> None:
        self.is_refused = True


def inbox(max_unclaimed_bytes: int = 1 << 20) -> Inbox:
    return Inbox(max_unclaimed_bytes)


async def waiting(box: Inbox, transfer_id: int, piece: int = 0) -> asyncio.Task[Offer]:
    task = asyncio.create_task(box.take(transfer_id, piece))
    await asyncio.sleep(0)
    return task


async def test_offers_and_receivers_meet_in_either_order() -> None:
    box = inbox()
    early, late = FakeOffer(A, 0), FakeOffer(A, 1)
    assert box.put(early)
    assert await box.take(A, 0) is early
    task = await waiting(box, A, 1)
    assert box.put(late)
    assert await task is late
    assert not early.is_refused
    assert not late.is_refused


async def test_an_ended_transfer_refuses_what_is_here_and_what_comes() -> None:
    box = inbox()
    here, later, other = FakeOffer(A, 0), FakeOffer(A, 1), FakeOffer(B)
    box.put(here)
    box.put(other)
    task = await waiting(box, A, 5)
    box.end(A, TransferTimeout("given up"))
    box.put(later)
    assert here.is_refused
    assert later.is_refused
    with pytest.raises(TransferTimeout, match="given up"):
        await task
    with pytest.raises(TransferTimeout, match="given up"):
        await box.take(A, 0)
    assert await box.take(B, 0) is other


async def test_a_second_offer_of_a_piece_is_refused() -> None:
    box = inbox()
    first, second = FakeOffer(A), FakeOffer(A)
    box.put(first)
    box.put(second)
    assert second.is_refused
    assert await box.take(A, 0) is first


async def test_a_link_is_bounded_and_another_is_not_affected() -> None:
    box = inbox(max_unclaimed_bytes=10_000)
    accepted = 0
    while box.put(FakeOffer(A, accepted, inline=bytes(1000), link="flooder")):
        accepted += 1
    assert 1 <= accepted <= 10
    assert box.put(FakeOffer(B, 0, inline=bytes(1000), link="other"))
    await box.take(A, 0)
    assert box.put(FakeOffer(A, accepted, inline=bytes(1000), link="flooder"))


async def test_a_lost_link_ends_transfers_whose_payload_is_lost_with_it() -> None:
    box = inbox()
    box.put(FakeOffer(A, 0, link="dead"))
    box.put(FakeOffer(B, 0, inline=b"here", link="dead"))
    box.lose("dead", PeerGone("it died"))
    with pytest.raises(PeerGone, match="it died"):
        await box.take(A, 0)
    assert bytes((await box.take(B, 0)).inline or b"") == b"here"


async def test_a_receiver_learns_that_the_link_of_its_transfer_is_lost() -> None:
    box = inbox()
    box.put(FakeOffer(A, 0, link="dead"))
    box.put(FakeOffer(B, 0, link="alive"))
    await box.take(A, 0)
    await box.take(B, 0)
    lost, going_on = await waiting(box, A, 1), await waiting(box, B, 1)
    box.lose("dead", PeerGone("it died"))
    with pytest.raises(PeerGone, match="it died"):
        await lost
    box.put(FakeOffer(B, 1, link="alive"))
    await going_on


async def test_what_dead_links_leave_is_bounded() -> None:
    box = inbox(max_unclaimed_bytes=10_000)
    for number in range(50):
        link = f"link {number}"
        for piece in range(6):
            assert box.put(FakeOffer((number + 1) << 20, piece, inline=bytes(900), link=link))
        box.lose(link, PeerGone("it died"))
    assert bytes((await box.take(50 << 20, 5)).inline or b"") == bytes(900)
    task = await waiting(box, 1 << 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancelled_receiver_refuses_what_it_was_just_given() -> None:
    box = inbox()
    offer = FakeOffer(A)
    task = await waiting(box, A)
    box.put(offer)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert offer.is_refused


@pytest.mark.parametrize(
    "act", [lambda box: None, lambda box: box.end(A, TransferTimeout("given up"))]
)
async def test_a_closed_inbox_takes_and_gives_nothing(act: Callable[[Inbox], None]) -> None:
    box = inbox()
    box.put(FakeOffer(A, 0))
    task = await waiting(box, B)
    act(box)
    box.close("closed")
    with pytest.raises(PeerGone, match="closed"):
        await task
    with pytest.raises(PeerGone, match="closed"):
        await box.take(A, 0)
    late = FakeOffer(B)
    assert box.put(late)
    assert late.is_refused
