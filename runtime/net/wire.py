"""TLS 1.3 between two members, as one byte stream that two threads may use: one reads while others write.

OpenSSL's connection objects are not for two threads at once, so every call goes through a lock; the socket never
blocks, waiting happens outside the lock, and every wait ends at a deadline.
"""

from __future__ import annotations

import hashlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from tacit.ir.errors import PartyError
from tacit.runtime.net.deployment import Deployment, Identity

_T = TypeVar("_T")
_WRITE = 1 << 16  # bytes handed to OpenSSL in one call
_RECORD = 1 << 14
_LINGER = 0.5  # seconds for an alert to arrive


class Closed(PartyError):
    """The connection ended: by the other side, by this one, or by the network."""


class Late(PartyError):
    """Nothing came, or nothing could be sent, before the deadline."""


def context(deployment: Deployment, identity: Identity, *, server: bool) -> ssl.SSLContext:
    """TLS 1.3 alone, both sides show certificates of this deployment's authority.

    Which member it is follows from the pinned fingerprint (`handshake`), not from a host name.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(cadata=deployment.authority)
    made.load_cert_chain(identity.certificate, identity.key)
    made.options |= ssl.OP_NO_COMPRESSION
    if server:
        made.num_tickets = 0  # no resumption: every connection proves its certificate anew
    return made


class Wire:
    """A TLS connection. Deadlines are values of time.monotonic()."""

    def __init__(self, sock: socket.socket, tls: ssl.SSLContext, *, server: bool, deadline: float) -> None:
        """Shake hands on a connected socket; raises PartyError, and closes the socket, where that fails."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self._lock = threading.Lock()
        self._closed = False
        self._buffer = memoryview(bytearray(_RECORD))
        self._begin = self._end = 0  # what of the buffer was received and not yet read
        self._readable = select.poll()  # the one reader's
        try:
            self._sock = tls.wrap_socket(sock, server_side=server, do_handshake_on_connect=False)
        except OSError as error:
            sock.close()
            raise Closed(_reason(error)) from None
        try:
            self._until(self._sock.do_handshake, deadline)
            self._readable.register(self._sock, select.POLLIN)
        except PartyError as error:
            self._linger(min(deadline, time.monotonic() + _LINGER))
            self._sock.close()
            raise Closed(f"the TLS handshake failed: {error}") from None

    def fingerprint(self) -> str:
        """SHA-256 of the certificate that the other side has proved to own."""
        der = self._sock.getpeercert(binary_form=True)
        assert der is not None
        return hashlib.sha256(der).hexdigest()

    def read(self, view: memoryview, deadline: float) -> None:
        """Fill the view. One caller at a time.

        Small reads go through a buffer of the size of a TLS record, which holds a header and a short message at once.
        """
        size = len(view)
        if size <= self._end - self._begin:  # as mostly
            view[:] = self._buffer[self._begin : self._begin + size]
            self._begin += size
            return
        while len(view):
            if self._begin < self._end:
                count = min(len(view), self._end - self._begin)
                view[:count] = self._buffer[self._begin : self._begin + count]
                self._begin += count
            elif len(view) >= _RECORD:
                count = self._receive(view, deadline)
            else:
                self._begin, self._end, count = 0, self._receive(self._buffer, deadline), 0
            view = view[count:]

    def wait(self, deadline: float) -> None:
        """Until there is something to read."""
        if self._begin == self._end:
            self._begin, self._end = 0, self._receive(self._buffer, deadline)

    def _receive(self, view: memoryview, deadline: float) -> int:
        # Waiting first is one call less than to find that nothing is there: a frame is read whole, then comes the next.
        with self._lock:
            pending = not self._closed and self._sock.pending()
        if not pending:
            self._wait(self._readable, deadline)
        count = self._until(partial(self._sock.recv_into, view), deadline)
        if not count:
            raise Closed("it closed the connection")
        return count

    def write(self, buffers: Iterable[bytes | memoryview], deadline: float) -> None:
        """Send all of it. One caller at a time."""
        for buffer in buffers:
            view = memoryview(buffer)
            while len(view):
                view = view[self._until(partial(self._sock.send, view[:_WRITE]), deadline) :]

    def _until(self, step: Callable[[], _T], deadline: float) -> _T:
        """Repeat a call of OpenSSL until it no longer wants the socket to be ready."""
        while True:
            try:
                with self._lock:
                    if self._closed:
                        raise Closed("the connection was closed")
                    return step()
            except ssl.SSLWantReadError:
                events = select.POLLIN
            except ssl.SSLWantWriteError:
                events = select.POLLOUT
            except (OSError, ValueError) as error:
                raise Closed(_reason(error)) from None
            poll = select.poll()
            try:
                poll.register(self._sock, events)
            except (OSError, ValueError):  # closed in between
                raise Closed("the connection was closed") from None
            self._wait(poll, deadline)

    @staticmethod
    def _wait(poll: select.poll, deadline: float) -> None:
        left = deadline - time.monotonic()
        try:
            ready = left > 0 and poll.poll(1000 * left)
        except (OSError, ValueError):  # closed in between
            raise Closed("the connection was closed") from None
        if not ready:
            raise Late("the deadline passed")

    def stop(self) -> None:
        """Wake everyone who waits on this connection; they find it closed."""
        with suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # SSLSocket.shutdown would drop the TLS state

    def finish(self) -> None:
        """Say that nothing more comes: what was sent still arrives, and the other side closes."""
        with suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_WR)

    def _linger(self, deadline: float) -> None:
        """Drop what still comes until the other side closes.

        A socket that is closed with bytes unread resets the connection, and the alert that tells the other side why
        would be lost with it: in TLS 1.3 a client is done, and may write, before its certificate was looked at.
        """
        self.finish()
        poll = select.poll()
        with suppress(OSError, ValueError):
            poll.register(self._sock, select.POLLIN)
            for _ in range(64):
                left = deadline - time.monotonic()
                if left <= 0 or not poll.poll(1000 * left) or not socket.socket.recv(self._sock, _RECORD):
                    return

    def leave(self) -> None:
        """Close this process's descriptor and say nothing; a thread that does not exist here may hold the lock."""
        self._closed = True
        self._sock.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._sock.close()


def _reason(error: Exception) -> str:
    """What OpenSSL or the system says, without addresses of memory and file names."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate was not accepted ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "unexpected end").lower().replace("_", " ")
        return f"TLS: {reason}"
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return "it reset the connection"
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
