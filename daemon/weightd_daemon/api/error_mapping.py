"""The one gRPC interceptor: admits calls, and turns domain errors into gRPC codes with details.

A bug becomes INTERNAL with an id. It also says how each call has ended, and ends handlers whose
answers nobody reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import secrets
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError

from weightd._limits import DAEMON, limit_error
from weightd._proto.v1 import errors_pb2
from weightd.errors import InvalidReferenceError, LeaseLostError, ServerError, WeightdError
from weightd_daemon import heap
from weightd_daemon.log_line import Line
from weightd_daemon.wire import clip

from .admission import TOKEN

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    from .admission import AdmittedRpc, RpcAdmission

log = logging.getLogger(__name__)

_TYPE_URL = "type.googleapis.com/google.rpc.ErrorInfo"
Context = grpc.aio.ServicerContext[Any, Any]

UNREAD_SECONDS = 60.0
"""How long an answer may wait for its reader to take it, where what HTTP/2 lets the server send is used up."""


class GrpcErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic only in its types
    """gRPC interceptor that encodes errors of unary and streaming calls, also after the first streamed message.

    Every call is served as a stream in both directions, which looks the same on the wire: so a request is received only
    when `admission` has let the call in, and decoded only when its size is known. When a call has ended, `on_call`
    hears its method ("DaemonService/GetStats") and gRPC code. `before_answer` is called before a message is sent: what
    it tells of must outlive the daemon.
    """

    def __init__(
        self, admission: RpcAdmission, on_call: Callable[[str, str], None], before_answer: Callable[[], None]
    ) -> None:
        self._admission = admission
        self._on_call = on_call
        self._before_answer = before_answer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Wrap the handler that the call goes to."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        token = str(dict(handler_call_details.invocation_metadata or ()).get(TOKEN, ""))

        async def serve(_: object, context: Context) -> None:
            code = "CANCELLED"  # unless it comes to an end of its own
            answer: Any = None
            failure: _Answer | None = None
            try:
                with self._admission.enter(method, token, streams=handler.request_streaming) as call:
                    answer = await self._serve(method, handler, call, context)
                code = "OK"
            except grpc.aio.AbortError:  # health's, which has set its own code
                code = context.code().name
                raise
            except Exception as error:  # noqa: BLE001  # the boundary: mapped, never swallowed
                failure = _answer_to(_known(method, error))
                error.with_traceback(None)  # its frames have the request, and a load that failed keeps its error
                code = failure.code
            finally:
                self._on_call(method.rpartition(".")[2], code)
            # From here on the call holds nothing but its bytes, however long its reader takes.
            if failure is not None:
                # Out of the handler above: what is raised here would keep the error, and with it a request's frames.
                await context.abort(grpc.StatusCode[code], failure.message, failure.trailers)
            elif answer is not None:
                await _write(context, answer)

        return grpc.stream_stream_rpc_method_handler(serve, response_serializer=handler.response_serializer)

    async def _serve(self, method: str, handler: Any, call: AdmittedRpc, context: Context) -> Any | None:
        """Receive what a call asks, and answer it as `_answer` does.

        Not in the frame of the call itself, which an aborted call's error keeps in gRPC: it would keep the request.
        """
        if handler.request_streaming:  # reflection's
            return await self._answer(method, handler, _requests(handler, call, context), context)
        request = await _receive(handler, call, context)
        return None if request is None else await self._answer(method, handler, request, context)

    async def _answer(self, method: str, handler: Any, request: Any, context: Context) -> Any | None:
        """Run a handler. Returns its only answer; sends those that it yields, and returns None."""
        inner = handler.unary_unary or handler.unary_stream or handler.stream_stream
        if inspect.isasyncgenfunction(inner):
            # Closed with the call, not when the collector comes: what it holds ends with it.
            async with contextlib.aclosing(inner(request, context)) as responses:
                async for response in responses:
                    self._before_answer()
                    async with _read_in_time(responses, method):
                        await _write(context, response)
            return None
        answer = await inner(request, context)  # None of one that writes its responses itself (health's Watch)
        self._before_answer()
        return answer


async def _receive(handler: Any, call: AdmittedRpc, context: Context) -> Any | None:
    """The next request of a call; None where the peer has sent all, has left, or gRPC has refused the rest."""
    async with call.reading():
        raw = await context.read()
    if raw is grpc.aio.EOF:  # type: ignore[attr-defined]  # public, but not in its types
        return None
    heap.freed(len(raw))
    call.check(len(raw))
    try:
        return handler.request_deserializer(raw)
    except DecodeError:
        raise InvalidReferenceError(f"the {len(raw)} bytes that were sent are no request of this call") from None


async def _requests(handler: Any, call: AdmittedRpc, context: Context) -> AsyncIterator[Any]:
    while (request := await _receive(handler, call, context)) is not None:
        yield request


async def _write(context: Context, answer: Any) -> None:
    """Send an answer. If that fails, the peer has left, and the call is cancelled, as gRPC does once it knows that.

    A handler that returned before would count as one that has answered: gRPC then sends the status, while the write is
    still on its way for it, and logs a traceback.
    """
    try:
        await context.write(answer)
    except Exception:  # noqa: BLE001  # of a class that is not public
        raise asyncio.CancelledError from None


@contextlib.asynccontextmanager
async def _read_in_time(responses: AsyncGenerator[Any, None], method: str) -> AsyncIterator[None]:
    """Around the moment in which a reader takes an answer. Errors: LeaseLostError (it took it too late).

    What the handler holds, such as a place among the readers of events, would be held as long as its reader likes. So
    the handler is ended from outside while the call waits. The call itself cannot be: gRPC keeps it until its answer is
    read, or the connection ends.
    """
    ended: list[asyncio.Task[None]] = []
    loop = asyncio.get_running_loop()

    def end() -> None:
        why = f"its answer was not read in {UNREAD_SECONDS:g} s"
        log.warning(Line("handler ended", {"method": method}, because=why))
        ended.append(loop.create_task(responses.aclose()))

    deadline = loop.call_later(UNREAD_SECONDS, end)
    try:
        yield
    finally:
        deadline.cancel()
        for task in ended:
            await task
    if ended:
        raise LeaseLostError(f"an answer of the call was not read in {UNREAD_SECONDS:g} s; call again")


def _known(method: str, error: Exception) -> WeightdError:
    """The error, or that there is a bug: the log has it then."""
    if isinstance(error, OSError) and not isinstance(error, WeightdError):
        limit = limit_error(error, f"answering {method.rpartition('/')[2]}", DAEMON)
        if limit is not None:
            log.warning(Line("request failed", {"method": method}, because=limit.message))
            return limit
    if not isinstance(error, WeightdError):
        number = secrets.token_hex(4)
        log.error(Line("bug", {"id": number, "method": method}), exc_info=error)
        return ServerError(f"the daemon failed ({type(error).__name__}); its log has it under id {number}")
    return error


class _Answer(NamedTuple):
    """How an error is sent: the name of its gRPC code, a line for people, and the details."""

    code: str
    message: str
    trailers: tuple[tuple[str, bytes]]


def _answer_to(error: WeightdError) -> _Answer:
    info = errors_pb2.ErrorInfo(reason=error.reason, domain="weightd", metadata=error.metadata)
    details = AnyMessage(type_url=_TYPE_URL, value=info.SerializeToString())
    message = clip(error.message)
    number = grpc.StatusCode[error.grpc_code].value[0]
    status = errors_pb2.Status(code=number, message=message, details=[details])
    return _Answer(error.grpc_code, message, (("grpc-status-details-bin", status.SerializeToString()),))
