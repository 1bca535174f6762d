/* Streams and events. Streams are lazy: work waits until somebody waits for it, as late as a real device may do it. A
 * program that reuses a buffer too early, or reads a result too early, finds wrong bytes here every time.
 *
 * The NULL stream does its work at once, after that of all blocking streams of the context. */
#include "fakecuda.h"

#include <stdlib.h>

enum { BLOCKING = 0, NON_BLOCKING = 1 };
enum { LEGACY_STREAM = 1, PER_THREAD_STREAM = 2 }; /* other names of the NULL stream, as far as this double goes */

typedef struct {
    uint64_t stream; /* identity */
    uint64_t position; /* so many pieces of its work */
} Point;

typedef struct Work {
    struct Work *next;
    bool is_wait;
    Transfer transfer;
    Point point; /* is_wait: another stream comes up to here first */
} Work;

typedef struct Stream {
    struct Stream *next;
    uint64_t identity;
    CUcontext context;
    unsigned flags;
    Work *first, **end;
    uint64_t enqueued, done;
    bool asked; /* cuStreamQuery has said NOT_READY */
} Stream;

typedef struct Event {
    struct Event *next;
    uint64_t identity;
    CUcontext context;
    Point recorded;
    bool asked;
} Event;

static Stream *streams;
static Event *events;

static bool is_null(CUstream handle)
{
    return (uint64_t)handle <= PER_THREAD_STREAM;
}

static Stream *stream_of(uint64_t identity)
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

/* Host memory that is not pinned is read or written before the call returns: the real driver stages it. */
CUresult enqueue(CUstream handle, Transfer transfer)
{
    if (is_null(handle)) {
        run_blocking_streams(current_context());
        perform(&transfer);
        return process.sticky;
    }
    Stream *stream = stream_of((uint64_t)handle);
    if (!stream)
        return INVALID_HANDLE;
    append(stream, (Work){.transfer = transfer});
    if ((transfer.kind == HOST_TO_DEVICE || transfer.kind == DEVICE_TO_HOST) && !transfer.pinned)
        run(stream, stream->enqueued);
    return process.sticky;
}

static void destroy(Stream *stream)
{
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
    if (is_null(handle))
        run_blocking_streams(current_context());
    else if (stream)
        run(stream, stream->enqueued);
    else
        return INVALID_HANDLE;
    return process.sticky;
}

/* The first question finds work not done yet, and the second finds it done. */
API CUresult cuStreamQuery(CUstream handle)
{
    ENTER(IN_CONTEXT);
    Stream *stream = stream_of((uint64_t)handle);
    if (is_null(handle)) {
        run_blocking_streams(current_context());
        return process.sticky;
    }
    if (!stream)
        return INVALID_HANDLE;
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
    if (!stream)
        run_blocking_streams(current_context());
    event->recorded = stream ? (Point){stream->identity, stream->enqueued} : (Point){0, 0};
    event->asked = false;
    return process.sticky;
}

API CUresult cuEventSynchronize(CUevent handle)
{
    ENTER(IN_CONTEXT);
    const Event *event = event_of(handle);
    if (!event)
        return INVALID_HANDLE;
    run_to(event->recorded);
    return process.sticky;
}

/* As cuStreamQuery. */
API CUresult cuEventQuery(CUevent handle)
{
    ENTER(IN_CONTEXT);
    Event *event = event_of(handle);
    if (!event)
        return INVALID_HANDLE;
    if (!is_reached(event->recorded) && !event->asked) {
        event->asked = true;
        return NOT_READY;
    }
    run_to(event->recorded);
    return process.sticky;
}

/* What the stream does from now on comes after what the event stands for now. */
API CUresult cuStreamWaitEvent(CUstream stream_handle, CUevent handle, unsigned flags)
{
    ENTER(IN_CONTEXT);
    (void)flags;
    const Event *event = event_of(handle);
    Stream *stream = stream_of((uint64_t)stream_handle);
    if (!event || !(stream || is_null(stream_handle)))
        return INVALID_HANDLE;
    if (stream)
        append(stream, (Work){.is_wait = true, .point = event->recorded});
    else
        run_to(event->recorded);
    return process.sticky;
}
