"""Pages over TCP: what arrives is what was sent, and what is wrong is named and leaves the receiver alive."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import SamplingParams
from labkit.transfer import KVPages, KVReceiver, TransferError, import_kv, send_kv
from tests.conftest import greedy
from tests.engines import drain, engine_of, random_prompt

PAGES = KVPages([1, 2, 3, 4], torch.arange(64.0).view(2, 1, 2, 2, 4, 2), "a model")
DATA = PAGES.to_bytes()
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def listening(**limits) -> Iterator[KVReceiver]:
    receiver = KVReceiver(**limits)
    try:
        yield receiver
    finally:
        receiver.close()


def refused(receiver: KVReceiver, send: Callable[[], object]) -> tuple[str, str]:
    """What the receiver, and then the sender, say of what is sent; afterwards, good pages arrive."""
    said: list[str] = []

    def sending() -> None:
        try:
            send()
        except (TransferError, OSError) as error:
            said.append(str(error))

    thread = threading.Thread(target=sending)
    thread.start()
    with pytest.raises(TransferError) as caught:
        receiver.receive(20)
    thread.join()
    thread = threading.Thread(target=send_kv, args=(receiver.address, PAGES))
    thread.start()
    assert torch.equal(receiver.receive(20).blocks, PAGES.blocks)
    thread.join()
    return str(caught.value), "".join(said)


def raw(receiver: KVReceiver, *parts: bytes) -> None:
    """Send these bytes, one part after each answer, and hang up."""
    with socket.create_connection(receiver.address, 20) as peer:
        for part in parts:
            peer.sendall(part)
            peer.shutdown(socket.SHUT_WR) if part is parts[-1] else peer.recv(1000)
        while peer.recv(1000):
            pass


def header(length: int) -> bytes:
    return struct.pack("<8sQ", b"labkitkv", length)


def test_prefill_in_one_process_and_decode_in_another() -> None:
    prompt = random_prompt(random.Random(1), 30)
    with listening() as receiver:
        tokens = ",".join(map(str, prompt))
        command = [sys.executable, "-m", "tests.transfer.sender", str(receiver.address[1]), tokens]
        sender = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        pages = receiver.receive(120)
        assert sender.communicate(timeout=120)[1] == ""
    engine = engine_of()
    assert import_kv(engine, pages) == 28
    name = engine.add_request(prompt, SamplingParams(max_tokens=9))
    drain(engine)
    assert engine.outputs[name].token_ids == greedy("llama", prompt, 9)
    assert engine.outputs[name].metrics.num_cached_tokens == 28


def test_what_is_too_large_is_refused_before_it_is_sent() -> None:
    with listening(max_bytes=100) as receiver:
        receiver.max_bytes = len(DATA)
        large = KVPages([1] * 80, torch.zeros(2, 20, 2, 2, 4, 2), "a model")
        here, there = refused(receiver, lambda: send_kv(receiver.address, large))
    assert here in there
    assert here == f"max_bytes is {len(DATA)}, and these pages have {len(large.to_bytes())}"


def test_something_else_is_named() -> None:
    with listening() as receiver:
        here, _ = refused(receiver, lambda: raw(receiver, b"GET / HTTP/1.1\r\n\r\n"))
        assert here == "these are no pages of labkit: they begin with b'GET / HT'"
        here, _ = refused(receiver, lambda: raw(receiver, header(5), b"hello"))
        assert here == "these are no pages of labkit"
        here, _ = refused(receiver, lambda: raw(receiver, header(2**63), b""))
        assert here == f"max_bytes is {2**30}, and these pages have {2**63}"


@settings(max_examples=25)
@given(end=st.integers(0, len(DATA) - 1))
def test_a_cut_frame_is_named(end: int) -> None:
    with listening() as receiver:
        here, _ = refused(receiver, lambda: raw(receiver, header(len(DATA)), DATA[:end]))
        assert here == f"the connection was cut after {end} of {len(DATA)} bytes"
        cut = end % 16
        here, _ = refused(receiver, lambda: raw(receiver, header(5)[:cut]))
        assert here == f"the connection was cut after {cut} of 16 bytes"


@settings(max_examples=25)
@given(place=st.integers(0, len(DATA) - 1), bit=st.integers(0, 7))
def test_damaged_pages_are_refused(place: int, bit: int) -> None:
    data = bytearray(DATA)
    data[place] ^= 1 << bit
    with contextlib.suppress(TransferError):
        KVPages.from_bytes(bytes(data))
        return  # a bit of padding
    with listening() as receiver:
        here, _ = refused(receiver, lambda: raw(receiver, header(len(DATA)), bytes(data)))
        assert here.startswith("these ")


def test_a_sender_that_says_nothing_does_not_hold_up_the_others() -> None:
    with listening(timeout=0.2) as receiver, socket.create_connection(receiver.address) as silent:
        with pytest.raises(TransferError, match=r"no pages came from \('127.0.0.1', \d+\): TimeoutError"):
            receiver.receive(20)
        silent.close()
        receiver.timeout = 20
        refused(receiver, lambda: raw(receiver, b""))


def test_a_sender_that_trickles_has_no_more_time_than_others() -> None:
    stop = threading.Event()
    with listening(timeout=0.3) as receiver, socket.create_connection(receiver.address) as slow:

        def trickle() -> None:
            with contextlib.suppress(OSError):
                slow.sendall(header(10**6))
                while not stop.wait(0.01):
                    slow.sendall(b"x")

        thread = threading.Thread(target=trickle)
        thread.start()
        with pytest.raises(TransferError, match="TimeoutError"):
            receiver.receive(20)
        stop.set()
        thread.join()


def test_a_receiver_that_is_not_there_or_says_nothing_is_named() -> None:
    with listening() as receiver:
        address = receiver.address
        with pytest.raises(TransferError, match=r"did not reach .*: TimeoutError"):
            send_kv(address, PAGES, timeout=0.2)  # nobody receives
    with pytest.raises(TransferError, match=f"did not reach .*{address[1]}.*: ConnectionRefusedError"):
        send_kv(address, PAGES)


def test_nobody_comes_and_the_address_is_taken() -> None:
    with listening() as receiver:
        with pytest.raises(TimeoutError):
            receiver.receive(0.01)
        assert receiver.address[0] == "127.0.0.1"  # and not everywhere
        with pytest.raises(OSError, match="in use"):
            KVReceiver(receiver.address)
