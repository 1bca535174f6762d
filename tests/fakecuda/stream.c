/* Streams and events. Streams are lazy: work waits until somebody waits for it, as late as a real device may do it. A
 * program that reuses a buffer too early, or reads a result too early, finds wrong bytes here every time.
 *
 * The NULL stream does its work at once, after that of all blocking streams of the context. */
#include "stream.h"

#include <stdlib.h>

Stream *streams;
static Event *events;

bool is_null(CUstream handle)
{
    return (uint64_t)handle <= PER_THREAD_STREAM;
}

Stream *stream_of(uint64_t identity)
{
    for (Stream *stream = streams; stream; stream = stream->next)
        if (stream->identity == identity)
            return stream;
    return NULL;
}

static Event *event_of(CUevent handle)
{
    for (Event *event = events; event; event = event->next)
        if (event->identity == (uint64_t)handle)
            return event;
    return NULL;
}

/* What has to be done for an event. Nothing where it was recorded in a capture, which did no work and has ended. */
static Point recorded_in(const Event *event)
{
    return event->capture ? (Point){0, 0} : event->recorded;
}

/* -- doing the work ----------------------------------------------------------------------------------------------- */

static void run(Stream *stream, uint64_t position);

static bool is_reached(Point point)
{
    const Stream *stream = stream_of(point.stream);
    return !stream || stream->done >= point.position;
}

static void run_to(Point point)
{
    Stream *stream = stream_of(point.stream);
    if (stream)
        run(stream, point.position);
}

static void run(Stream *stream, uint64_t position)
{
    while (stream->done < position) {
        Work *work = stream->first;
        if (work->is_wait)
            run_to(work->point);
        else
            perform(&work->transfer);
        stream->first = work->next;
        if (!stream->first)
            stream->end = &stream->first;
        stream->done++;
        free(work);
    }
}

void run_blocking_streams(CUcontext context)
{
    for (Stream *stream = streams; stream; stream = stream->next)
        if (stream->context == context && stream->flags == BLOCKING)
            run(stream, stream->enqueued);
}

static void append(Stream *stream, Work fields)
{
    Work *work = malloc(sizeof *work);
    *work = fields;
    work->next = NULL;
    *stream->end = work;
    stream->end = &work->next;
    stream->enqueued++;
    stream->asked = false;
}

/* By the engine of `device`, unless the call named who reads and who writes. */
static void assign(Transfer *transfer, CUdevice device)
{
    if (!transfer->is_between_peers)
        transfer->device = transfer->reader = device;
}

CUresult do_now(Transfer transfer)
{
    REFUSED_BY(use_null_stream(current_context()));
    assign(&transfer, current_context()->device);
    run_blocking_streams(current_context());
    perform(&transfer);
    return process.sticky;
}

/* Host memory that is not pinned is read or written before the call returns: the real driver stages it. */
CUresult enqueue(CUstream handle, Transfer transfer)
{
    if (is_null(handle))
        return do_now(transfer);
    Stream *stream = stream_of((uint64_t)handle);
    if (!stream)
        return INVALID_HANDLE;
    assign(&transfer, stream->context->device);
    if (stream->capture)
        return capture_work(stream, &transfer);
    append(stream, (Work){.transfer = transfer});
    if ((transfer.kind == HOST_TO_DEVICE || transfer.kind == DEVICE_TO_HOST) && !transfer.pinned)
        run(stream, stream->enqueued);
    return process.sticky;
}

static void destroy(Stream *stream)
{
    leave_capture(stream);
    run(stream, stream->enqueued);
    Stream **place = &streams;
    while (*place != stream)
        place = &(*place)->next;
    *place = stream->next;
    free(stream);
}

void destroy_streams_of(CUcontext context)
{
    for (Stream *stream = streams, *next; stream; stream = next) {
        next = stream->next;
        if (stream->context == context)
            destroy(stream);
    }
    for (Event **place = &events, *event; (event = *place) != NULL;) {
        if (event->context != context) {
            place = &event->next;
            continue;
        }
        *place = event->next;
        free(event);
    }
}

/* -- streams ------------------------------------------------------------------------------------------------------ */

static CUresult create_stream(CUstream *handle, unsigned flags)
{
    if (flags != BLOCKING && flags != NON_BLOCKING)
        return INVALID_VALUE;
    Stream *stream = calloc(1, sizeof *stream);
    stream->identity = new_identity();
    stream->context = current_context();
    stream->flags = flags;
    stream->end = &stream->first;
    stream->next = streams;
    streams = stream;
    *handle = (CUstream)stream->identity;
    return SUCCESS;
}

API CUresult cuStreamCreate(CUstream *handle, unsigned flags)
{
    ENTER(IN_CONTEXT);
    return create_stream(handle, flags);
}

API CUresult cuStreamCreateWithPriority(CUstream *handle, unsigned flags, int priority)
{
    ENTER(IN_CONTEXT);
    (void)priority;
    return create_stream(handle, flags);
}

API CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest)
{
    ENTER(IN_CONTEXT);
    if (least)
        *least = 0;
    if (greatest)
        *greatest = 0;
    return SUCCESS;
}

API CUresult cuStreamDestroy_v2(CUstream handle)
{
    ENTER(HEALTHY);
    Stream *stream = stream_of((uint64_t)handle);
    if (!stream)
        return INVALID_HANDLE;
    destroy(stream);
    return SUCCESS;
}

API CUresult cuStreamSynchronize(CUstream handle)
{
    ENTER(IN_CONTEXT);
    Stream *stream = stream_of((uint64_t)handle);
    if (!stream && !is_null(handle))
        return INVALID_HANDLE;
    REFUSED_BY(stream ? ask_stream(stream) : use_null_stream(current_context()));
    if (stream)
        run(stream, stream->enqueued);
    else
        run_blocking_streams(current_context());
    return process.sticky;
}

/* The first question finds work not done yet, and the second finds it done. */
API CUresult cuStreamQuery(CUstream handle)
{
    ENTER(IN_CONTEXT);
    Stream *stream = stream_of((uint64_t)handle);
    if (is_null(handle)) {
        REFUSED_BY(use_null_stream(current_context()));
        run_blocking_streams(current_context());
        return process.sticky;
    }
    if (!stream)
        return INVALID_HANDLE;
    REFUSED_BY(ask_stream(stream));
    if (stream->done < stream->enqueued && !stream->asked) {
        stream->asked = true;
        return NOT_READY;
    }
    run(stream, stream->enqueued);
    return process.sticky;
}

API CUresult cuCtxSynchronize(void)
{
    ENTER(IN_CONTEXT);
    REFUSED_BY(wait_for_context(current_context()));
    for (Stream *stream = streams; stream; stream = stream->next)
        if (stream->context == current_context())
            run(stream, stream->enqueued);
    return process.sticky;
}

/* -- events ------------------------------------------------------------------------------------------------------- */

API CUresult cuEventCreate(CUevent *handle, unsigned flags)
{
    ENTER(IN_CONTEXT);
    (void)flags;
    Event *event = calloc(1, sizeof *event);
    event->identity = new_identity();
    event->context = current_context();
    event->next = events;
    events = event;
    *handle = (CUevent)event->identity;
    return SUCCESS;
}

API CUresult cuEventDestroy_v2(CUevent handle)
{
    ENTER(HEALTHY);
    Event *event = event_of(handle);
    if (!event)
        return INVALID_HANDLE;
    Event **place = &events;
    while (*place != event)
        place = &(*place)->next;
    *place = event->next;
    free(event);
    return SUCCESS;
}

API CUresult cuEventRecord(CUevent handle, CUstream stream_handle)
{
    ENTER(IN_CONTEXT);
    Event *event = event_of(handle);
    Stream *stream = stream_of((uint64_t)stream_handle);
    if (!event || !(stream || is_null(stream_handle)))
        return INVALID_HANDLE;
    if (event->context != (stream ? stream->context : current_context()))
        return INVALID_HANDLE;
    event->asked = false;
    if (stream && stream->capture)
        return capture_record(stream, event);
    if (!stream) {
        REFUSED_BY(use_null_stream(current_context()));
        run_blocking_streams(current_context());
    }
    event->capture = 0;
    event->recorded = stream ? (Point){stream->identity, stream->enqueued} : (Point){0, 0};
    return process.sticky;
}

API CUresult cuEventSynchronize(CUevent handle)
{
    ENTER(IN_CONTEXT);
    const Event *event = event_of(handle);
    if (!event)
        return INVALID_HANDLE;
    REFUSED_BY(ask_event(event));
    run_to(recorded_in(event));
    return process.sticky;
}

/* As cuStreamQuery. */
API CUresult cuEventQuery(CUevent handle)
{
    ENTER(IN_CONTEXT);
    Event *event = event_of(handle);
    if (!event)
        return INVALID_HANDLE;
    REFUSED_BY(ask_event(event));
    if (!is_reached(recorded_in(event)) && !event->asked) {
        event->asked = true;
        return NOT_READY;
    }
    run_to(recorded_in(event));
    return process.sticky;
}

/* What the stream does from now on comes after what the event stands for now. */
API CUresult cuStreamWaitEvent(CUstream stream_handle, CUevent handle, unsigned flags)
{
    ENTER(IN_CONTEXT);
    const Event *event = event_of(handle);
    Stream *stream = stream_of((uint64_t)stream_handle);
    if (!event || !(stream || is_null(stream_handle)))
        return INVALID_HANDLE;
    if ((stream && stream->capture) || capture_of(event))
        return capture_wait(stream, event, flags);
    if (!stream)
        REFUSED_BY(use_null_stream(current_context()));
    if (stream)
        append(stream, (Work){.is_wait = true, .point = recorded_in(event)});
    else
        run_to(recorded_in(event));
    return process.sticky;
}
