"""One interceptor: errors of the domain become gRPC codes with details; a bug becomes INTERNAL with an id.

It also says how each call has ended, and ends those whose answers nobody reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import secrets
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage

from weightd._limits import DAEMON, limit_error
from weightd._proto.v1 import errors_pb2
from weightd.errors import ServerError, WeightdError
from weightd_daemon.wire import clip

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

log = logging.getLogger(__name__)

_TYPE_URL = "type.googleapis.com/google.rpc.ErrorInfo"
Context = grpc.aio.ServicerContext[Any, Any]

UNREAD_SECONDS = 60.0
"""How long an answer may wait for its reader to take it, where what HTTP/2 lets the server send is used up."""


class ErrorMapping(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic only in its types
    """Wraps unary and streaming handlers alike, also for errors after the first streamed message.

    When a call has ended, `on_call` hears its method ("DaemonService/GetStats") and gRPC code. `before_answer` is
    called before a message is sent: what it tells of must outlive the daemon.
    """

    def __init__(self, on_call: Callable[[str, str], None], before_answer: Callable[[], None]) -> None:
        self._on_call = on_call
        self._before_answer = before_answer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Wrap the handler that the call goes to."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler  # none of ours streams requests (reflection does, and maps its own errors)
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        method = handler_call_details.method
        inner: Any = handler.unary_unary or handler.unary_stream  # the types know only synchronous handlers
        if inspect.isasyncgenfunction(inner):

            async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
                # Closed with this one, not when the collector comes: what it holds ends with the call.
                async with self._ending(context, method), contextlib.aclosing(inner(request, context)) as responses:
                    async for response in responses:
                        self._before_answer()
                        deadline = _unread(method)
                        try:
                            yield response
                        finally:
                            deadline.cancel()

            return grpc.unary_stream_rpc_method_handler(stream, **codec)

        async def single(request: Any, context: Context) -> Any:
            async with self._ending(context, method):
                response = await inner(request, context)
                self._before_answer()
                return response

        if handler.response_streaming:  # one that writes its responses to the context (health's Watch)
            return grpc.unary_stream_rpc_method_handler(single, **codec)
        return grpc.unary_unary_rpc_method_handler(single, **codec)

    @contextlib.asynccontextmanager
    async def _ending(self, context: Context, method: str) -> AsyncIterator[None]:
        """Around what answers a call."""
        code = "CANCELLED"  # unless it comes to an end of its own
        try:
            yield
            code = "OK"
        except grpc.aio.AbortError:  # health's, which has set its own code
            code = context.code().name
            raise
        except Exception as error:  # noqa: BLE001  # the boundary: mapped, never swallowed
            known = _known(method, error)
            code = known.grpc_code
            await _abort(context, known)
        finally:
            self._on_call(method.rpartition(".")[2], code)
            deadline = _unread(method)  # of the last answer, and of the status behind it
            _task().add_done_callback(lambda _: deadline.cancel())


def _unread(method: str) -> asyncio.TimerHandle:
    """End the call of this task unless the handle is cancelled in time. Its reader does not hear why: it reads nothing.

    What a call holds (its answer, a reader of events, a connection) is held for as long as its reader likes otherwise.
    """
    task = _task()

    def end() -> None:
        log.warning("call ended method=%s: its answer was not read in %g s", method, UNREAD_SECONDS)
        task.cancel()

    return asyncio.get_running_loop().call_later(UNREAD_SECONDS, end)


def _task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None  # gRPC runs each call in a task of its own
    return task


def _known(method: str, error: Exception) -> WeightdError:
    """The error, or that there is a bug: the log has it then."""
    if isinstance(error, OSError) and not isinstance(error, WeightdError):
        limit = limit_error(error, f"answering {method.rpartition('/')[2]}", DAEMON)
        if limit is not None:
            log.warning("request failed method=%s: %s", method, limit.message)
            return limit
    if not isinstance(error, WeightdError):
        number = secrets.token_hex(4)
        log.error("bug id=%s method=%s", number, method, exc_info=error)
        return ServerError(f"the daemon failed ({type(error).__name__}); its log has it under id {number}")
    return error


async def _abort(context: Context, error: WeightdError) -> NoReturn:
    code = grpc.StatusCode[error.grpc_code]
    info = errors_pb2.ErrorInfo(reason=error.reason, domain="weightd", metadata=error.metadata)
    details = AnyMessage(type_url=_TYPE_URL, value=info.SerializeToString())
    message = clip(error.message)
    status = errors_pb2.Status(code=code.value[0], message=message, details=[details])
    trailer = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(code, message, trailer)
    raise AssertionError("abort raises")
