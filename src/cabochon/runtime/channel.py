"""Messages between two processes of one host: JSON over a socket, big arrays in shared memory.

A message is a short JSON object, perhaps with a record. The record's bytes go with it where they
are few; where they are many they are written into a piece of shared memory, which the other side
copies out of and then gives back with its next message. Nobody ever waits for memory: where all
pieces are under way the bytes go with the message all the same.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from cabochon.runtime.memory import Memory
from cabochon.runtime.records import Bytes, Payload, decoded, encoded

__all__ = ["Channel", "socket_pairs"]

IN_BAND = 16 * 1024
"""Bytes up to which a socket is as quick as shared memory."""

PIECES = 4
"""Of shared memory, that a side has under way at most."""

SMALLEST = 256 * 1024

_LENGTH = struct.Struct("<II")


def socket_pairs() -> tuple[tuple[socket.socket, socket.socket], ...]:
    """Two ends, each of a socket for messages and one for what only a descriptor can tell."""
    ours, theirs = socket.socketpair()
    our_side, their_side = socket.socketpair()
    return (ours, our_side), (theirs, their_side)


class Channel:
    """One end. Any thread may send; one thread receives."""

    def __init__(
        self,
        main: socket.socket,
        side: socket.socket,
        share: Callable[[Any], Any],
        shared: Callable[[Any], Any],
    ) -> None:
        """An end of a pair of sockets.

        Args:
            main: for the messages.
            side: for descriptors.
            share: see `records.encoded`; it may call `send_memory`.
            shared: see `records.decoded`; it may call `receive_memory`.
        """
        self._main, self._side = main, side
        self._connection = Connection(os.dup(main.fileno()))
        self._share, self._shared = share, shared
        self._sending = threading.Lock()
        self._pieces: dict[int, Memory] = {}
        self._free: set[int] = set()
        self._sent = 0
        self._seen: list[int] = []
        self._gone: list[int] = []
        self._theirs: dict[int, Memory] = {}
        self._arrived: dict[int, int] = {}

    def send(self, head: dict[str, Any], record: Any = None) -> None:
        """Send a message.

        Raises:
            DataError: the record is none; nothing was sent.
            OSError: the other side is gone.
        """
        with self._sending:
            payload = Payload()
            message = {**head, "record": encoded(record, payload, self._share)}
            piece = self._piece(payload.size) if payload.size > IN_BAND else None
            if piece is not None:
                payload.write(self._pieces[piece].bytes)
                message["piece"] = [piece, self._pieces[piece].bytes.size, payload.size]
            message["seen"], self._seen = self._seen, []
            message["gone"], self._gone = self._gone, []
            text = json.dumps(message, separators=(",", ":")).encode()
            in_band = 0 if piece is not None else payload.size
            start = _LENGTH.size + len(text)
            whole = np.empty(start + in_band, np.uint8)
            whole[: _LENGTH.size] = np.frombuffer(_LENGTH.pack(len(text), in_band), np.uint8)
            whole[_LENGTH.size : start] = np.frombuffer(text, np.uint8)
            if in_band:
                payload.write(whole[start:])
            self._connection.send_bytes(whole)  # type: ignore[arg-type]

    def receive(self) -> tuple[dict[str, Any], Any]:
        """Wait for the next message: its head and its record.

        Raises:
            EOFError, OSError: the other side is gone.
        """
        whole = self._connection.recv_bytes()
        length, in_band = _LENGTH.unpack_from(whole)
        start = _LENGTH.size + length
        message = json.loads(whole[_LENGTH.size : start])
        self._free.update(message.pop("seen"))
        for number in message.pop("gone"):
            self._theirs.pop(number, None)
        payload: Bytes = np.empty(in_band, np.uint8)
        if "piece" in message:
            payload = self._copied(*message.pop("piece"))
        else:
            payload[:] = np.frombuffer(whole, np.uint8, offset=start)
        return message, decoded(message.pop("record"), payload, self._shared)

    def send_memory(self, memory: Memory) -> int:
        """Let the other side see this memory too; the number by which it asks for it."""
        self._sent += 1
        socket.send_fds(self._side, [struct.pack("<Q", self._sent)], [memory.descriptor])
        return self._sent

    def receive_memory(self, number: int, size: int) -> Memory:
        """The memory that the other side sent by this number."""
        while number not in self._arrived:
            tag, descriptors, _, _ = socket.recv_fds(self._side, 8, 1)
            if not descriptors:
                raise EOFError
            self._arrived[struct.unpack("<Q", tag)[0]] = descriptors[0]
        return Memory(size, self._arrived.pop(number))

    def hang_up(self) -> None:
        """Whoever receives, here or there, finds that the other side is gone."""
        for end in (self._main, self._side):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:  # it was already
                continue

    def close(self) -> None:
        """Free the descriptors and the memory; when nobody receives any more."""
        with self._sending:
            self._connection.close()
            self._main.close()
            self._side.close()
            self._pieces.clear()
            self._free.clear()
        self._theirs.clear()

    def _piece(self, size: int) -> int | None:
        """The number of a free piece of at least this size, made if need be; None: all are busy."""
        for number in tuple(self._free):
            if self._pieces[number].bytes.size >= size:
                self._free.discard(number)
                return number
        if len(self._pieces) == PIECES:
            if not self._free:
                return None
            given_up = self._free.pop()  # too small
            del self._pieces[given_up]
            self._gone.append(given_up)
        memory = Memory(max(SMALLEST, 1 << (size - 1).bit_length()))
        number = self.send_memory(memory)
        self._pieces[number] = memory
        return number

    def _copied(self, number: int, size: int, used: int) -> Bytes:
        if number not in self._theirs:
            self._theirs[number] = self.receive_memory(number, size)
        payload = self._theirs[number].bytes[:used].copy()
        self._seen.append(number)
        return payload
