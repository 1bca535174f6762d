"""The command `token`, which holds a read-only connection for tools that call the daemon by gRPC."""

from __future__ import annotations

import select
import shlex
import sys

import typer

from weightd._transport.address import find_socket
from weightd._transport.handle_socket import SocketClient
from weightd.cli.context import CommandOptions, FormatOption, OutputFormat, SocketOption
from weightd.cli.output import StdoutClosedError, emit, emit_json_line, flush, printable
from weightd.errors import DaemonUnreachableError

_SECONDS = 5.0


def token(context: typer.Context, output: FormatOption = OutputFormat.TABLE, socket: SocketOption = None) -> None:
    """Hold a read-only token for gRPC tools until Ctrl-C.

    A call passes the token as metadata, with the key weightd-token. It can look at everything that you may see, and
    change nothing. The first line of the output is the token.

    \b
    Examples:
      weightd token
      weightd token --format json
      weightd token --socket /run/weightd/weightd.sock
    """
    settings: CommandOptions = context.obj
    path = find_socket(socket or settings.socket)
    connection = SocketClient(path, _SECONDS, read_only=True)
    try:
        if output is OutputFormat.JSON:
            emit_json_line({"token": connection.token, "metadata": "weightd-token", "socket": str(path)})
        else:
            emit(connection.token)
            emit("")
            emit("It is valid until this command ends. To pass it with grpcurl:")
            emit("")
            where = printable(shlex.quote(str(path)))
            # In the environment: command lines can be read by every user, who could then look in this one's name.
            emit(f"  export WEIGHTD_TOKEN={shlex.quote(connection.token)}")
            header = "-expand-headers -H 'weightd-token: ${WEIGHTD_TOKEN}'"
            emit(f"  grpcurl -plaintext -unix {header} {where} weightd.v1.DaemonService/GetStats")
            flush()
        _hold(connection)
    finally:
        connection.close()


def _hold(connection: SocketClient) -> None:
    """Wait until the daemon hangs up (DaemonUnreachableError) or the reader of stdout leaves (StdoutClosedError)."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    reader = sys.stdout.fileno()
    poll.register(reader, 0)  # of a pipe, an error says that nobody reads it
    if reader in {descriptor for descriptor, _ in poll.poll()}:
        raise StdoutClosedError
    raise DaemonUnreachableError(
        f"the weightd daemon at {connection.path} closed the connection, and the token is void; get a new one"
    )
