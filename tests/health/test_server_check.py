"""The second opinion: what is made of real sockets that answer, refuse, are silent, or are none."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import pytest

from enginefsm.fsm.verdicts import ServerAnswer
from enginefsm.health.server_check import Address, ServerCheck, ask


def opinion(answer, path="", timeout_s=5.0):
    """What is made of a server that sends `answer` and closes; None: it sends nothing. With what it was asked."""
    asked = []

    async def serve(reader, writer):
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        if answer is not None:
            writer.write(answer)
            writer.close()

    async def run():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            return await ask(Address(f"http://127.0.0.1:{port}{path}"), timeout_s)
        finally:
            server.close()

    return asyncio.run(run()), b"".join(asked)


def test_a_server_that_answers_200_serves():
    said, asked = opinion(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert said is ServerAnswer.SERVES
    assert asked.startswith(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:")


def test_health_is_asked_after_under_the_base_url():
    assert opinion(b"HTTP/1.1 200 OK\r\n\r\n", path="/engine/")[1].startswith(b"GET /engine/health HTTP/1.1")


@pytest.mark.parametrize("answer", [b"HTTP/1.1 503 Service Unavailable\r\n\r\n", b"HTTP/1.1 302 Found\r\n\r\n",
                                    b"HTTP/1.1 500\r\n\r\n"])  # fmt: skip
def test_a_server_that_answers_anything_else_is_unwell(answer):
    assert opinion(answer)[0] is ServerAnswer.UNWELL


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH\r\n", b"x" * 200_000])
def test_a_server_that_closes_the_connection_or_speaks_no_http_fails(answer):
    assert opinion(answer)[0] is ServerAnswer.FAILS


def test_a_port_where_nothing_listens_fails():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        assert asyncio.run(ask(Address(f"http://127.0.0.1:{held.getsockname()[1]}"), 5.0)) is ServerAnswer.FAILS


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (["127.0.0.1", "127.0.0.2"], ServerAnswer.FAILS),
        (["127.0.0.1", "255.255.255.255"], ServerAnswer.UNKNOWN),  # to the second there is no way from here
        (["255.255.255.255"], ServerAnswer.UNKNOWN),
    ],
)
def test_a_host_with_several_addresses_fails_if_all_of_them_refuse(monkeypatch, places, said):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port, look_up = held.getsockname()[1], socket.getaddrinfo

        def answer(host, *args, **kwargs):
            hosts = places if host == "engine.example" else [host]
            return [found for one in hosts for found in look_up(one, port, type=socket.SOCK_STREAM)]

        monkeypatch.setattr(socket, "getaddrinfo", answer)
        assert asyncio.run(ask(Address(f"http://engine.example:{port}"), 5.0)) is said


def test_a_host_is_asked_at_its_next_address_if_the_first_refuses(monkeypatch):
    look_up = socket.getaddrinfo

    def answer(host, port, *args, **kwargs):
        return [found for one in ("127.0.0.2", host) for found in look_up(one, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    assert opinion(b"HTTP/1.1 200 OK\r\n\r\n")[0] is ServerAnswer.SERVES


def test_a_silent_server_is_unknown_after_the_timeout():
    began = time.monotonic()
    assert opinion(None, timeout_s=0.2)[0] is ServerAnswer.UNKNOWN
    assert time.monotonic() - began < 30


def test_a_server_that_does_not_accept_is_unknown():
    with contextlib.ExitStack() as sockets:
        full = sockets.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        assert asyncio.run(ask(Address(f"http://127.0.0.1:{full.getsockname()[1]}"), 0.2)) is ServerAnswer.UNKNOWN


def test_what_was_asked_before_a_pause_says_nothing_after_it(monkeypatch):
    async def opinion_after_a_pause():
        answered, asked = asyncio.Event(), asyncio.Event()

        async def slow(address, timeout_s):
            await answered.wait()
            return ServerAnswer.UNWELL

        monkeypatch.setattr("enginefsm.health.server_check.ask", slow)
        monkeypatch.setattr(ServerCheck, "_learn_address", lambda opinion, engine: None)
        opinion = ServerCheck(lambda: None, "get_url", 30, asked.set)
        opinion._address = Address("http://127.0.0.1:1")
        asking = asyncio.ensure_future(opinion.keep_asking())
        opinion.ask()
        await asyncio.sleep(0)
        opinion.forget()
        answered.set()
        await asked.wait()
        asking.cancel()
        return opinion.said

    assert asyncio.run(opinion_after_a_pause()) is ServerAnswer.UNKNOWN


def test_no_proxy_is_asked(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert opinion(b"HTTP/1.1 200 OK\r\n\r\n")[0] is ServerAnswer.SERVES


@pytest.mark.parametrize("url", [None, 8000, "", "127.0.0.1:8000", "https://127.0.0.1", "http://", "http://h:x"])
def test_what_is_no_http_url_is_refused(url):
    with pytest.raises(ValueError, match=r"URL|[Pp]ort"):
        Address(url)


def test_an_address_of_ipv6_is_understood():
    address = Address("http://[::1]:30000")
    assert (address.host, address.port) == ("::1", 30000)
    assert b"Host: [::1]:30000\r\n" in address.request
