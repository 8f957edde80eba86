"""Read by every Python that has this folder on PYTHONPATH: a Jupyter kernel reaches this machine alone.

Any other connection fails and is noted in the file that LGAP_TRESPASS names. HF_HUB_OFFLINE is taken back,
as most users do not set it.
"""

import os
import socket
import sys


def local(host):
    own = (None, "", "localhost", b"localhost", "::1", socket.gethostname())
    return host in own or str(host).startswith("127.")


def refuse(host):
    with open(os.environ["LGAP_TRESPASS"], "a") as f:
        f.write(f"{host}\n")
    raise OSError(f"a notebook tried to reach {host}")


def guarded(call):
    """A socket's method whose last argument is an address; that of a Unix socket is no tuple."""

    def checked(self, *arguments):
        if isinstance(arguments[-1], tuple) and not local(arguments[-1][0]):
            refuse(arguments[-1][0])
        return call(self, *arguments)

    return checked


def looked_up(host, *arguments, **settings):
    if not local(host):
        refuse(host)
    return getaddrinfo(host, *arguments, **settings)


if any("ipykernel" in word for word in sys.orig_argv):
    os.environ.pop("HF_HUB_OFFLINE", None)
    getaddrinfo, socket.getaddrinfo = socket.getaddrinfo, looked_up
    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
