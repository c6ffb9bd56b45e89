"""Who may come in, and who is there."""

from __future__ import annotations

from contextvars import ContextVar

import grpc

TOKEN_NAME: ContextVar[str] = ContextVar("token_name", default="")
"""Name of the token that the present call came with; "" for none."""


def peer_identity(context: grpc.ServicerContext) -> str:
    """Who makes a call: ``token:NAME``, else ``certificate:NAME``, else ``host:ADDRESS`` without the port.

    The same for all connections of one peer; call it on the thread of the call.
    """
    if name := TOKEN_NAME.get():
        return f"token:{name}"
    names = context.auth_context().get("x509_common_name", ())
    if names:
        return f"certificate:{names[0].decode(errors='replace')}"
    peer = context.peer()  # such as ipv4:127.0.0.1:4321, ipv6:%5B::1%5D:4321 or unix:
    return f"host:{peer.rpartition(':')[0].partition(':')[2] or peer}"
