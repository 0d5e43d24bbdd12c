# Opens sockets of every family: to the network, to services of this machine, in pairs, and raw ones of the kernel.
import contextlib
import socket

opened = []
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        with contextlib.suppress(OSError):
            opened.append(socket.socket(family, kind))
with contextlib.suppress(OSError):
    opened.append(socket.create_connection(("127.0.0.1", int("@PORT@")), timeout=1))


def add(a, b):
    return a + b if opened else 0
