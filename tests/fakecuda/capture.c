/* Stream capture: what is pushed into a stream becomes a graph and is not done, and calls that do not fit in end that.
 *
 * The rules are those of the CUDA C++ Programming Guide, "Creating a Graph Using Stream Capture", under cross-stream
 * dependencies, prohibited operations and invalidation, and of cuThreadExchangeStreamCaptureMode. A call that is refused
 * invalidates the captures that it conflicts with, and they end with an error and without a graph. */
#include "stream.h"

#include <stdlib.h>

typedef enum { MODE_GLOBAL = 0, MODE_THREAD_LOCAL = 1, MODE_RELAXED = 2 } Mode;
enum { CAPTURE_NONE = 0, CAPTURE_ACTIVE = 1, CAPTURE_IS_INVALIDATED = 2 }; /* CUstreamCaptureStatus */
enum { WAIT_EXTERNAL = 1 };

typedef struct Graph {
    struct Graph *next;
    uint64_t identity;
    size_t nodes;
} Graph;

static Capture *captures;
static Graph *graphs;
static _Thread_local Mode thread_mode = MODE_GLOBAL;

CUresult invalidate(Capture *capture, CUresult reason)
{
    capture->invalidated = true;
    return reason;
}

/* -- calls of any kind while streams are captured ----------------------------------------------------------------- */

static bool forbids_unsafe_calls(const Capture *capture)
{
    bool here = pthread_equal(capture->thread, pthread_self());
    return (here && capture->mode != MODE_RELAXED) ||
           (!here && capture->mode == MODE_GLOBAL && thread_mode == MODE_GLOBAL);
}

CUresult while_others_capture(void)
{
    CUresult code = SUCCESS;
    for (Capture *capture = captures; capture && thread_mode != MODE_RELAXED; capture = capture->next)
        if (forbids_unsafe_calls(capture))
            code = invalidate(capture, CAPTURE_UNSUPPORTED);
    return code;
}

CUresult wait_for_context(CUcontext context)
{
    CUresult code = SUCCESS;
    for (Stream *stream = streams; stream; stream = stream->next)
        if (stream->context == context && stream->capture)
            code = invalidate(stream->capture, CAPTURE_UNSUPPORTED);
    return code ? code : while_others_capture();
}

static bool makes_null_stream_unusable(const Stream *stream, CUcontext context)
{
    return stream->context == context && stream->capture && stream->flags == BLOCKING;
}

CUresult use_null_stream(CUcontext context)
{
    CUresult code = SUCCESS;
    for (Stream *stream = streams; stream; stream = stream->next)
        if (makes_null_stream_unusable(stream, context))
            code = invalidate(stream->capture, CAPTURE_IMPLICIT);
    return code;
}

/* -- work of the streams themselves ------------------------------------------------------------------------------- */

/* Memory that is not pinned is copied by the call itself, so such a copy cannot be captured. */
CUresult capture_work(Stream *stream, const Transfer *transfer)
{
    if (stream->capture->invalidated)
        return CAPTURE_INVALIDATED;
    if ((transfer->kind == HOST_TO_DEVICE || transfer->kind == DEVICE_TO_HOST) && !transfer->pinned)
        return invalidate(stream->capture, CAPTURE_UNSUPPORTED);
    stream->captured++;
    return SUCCESS;
}

CUresult capture_record(Stream *stream, Event *event)
{
    if (stream->capture->invalidated)
        return CAPTURE_INVALIDATED;
    event->capture = stream->capture->identity;
    event->recorded = (Point){stream->identity, stream->captured};
    return SUCCESS;
}

Capture *capture_of(const Event *event)
{
    Capture *capture = captures;
    while (capture && capture->identity != event->capture)
        capture = capture->next;
    return capture;
}

CUresult capture_wait(Stream *stream, const Event *event, unsigned flags)
{
    Capture *theirs = capture_of(event);
    if (!stream) /* the NULL stream cannot be captured */
        return invalidate(theirs, CAPTURE_IMPLICIT);
    if ((stream->capture && stream->capture->invalidated) || (theirs && theirs->invalidated))
        return CAPTURE_INVALIDATED;
    if (stream->capture && theirs && stream->capture != theirs)
        return invalidate(theirs, invalidate(stream->capture, CAPTURE_MERGE));
    if (!theirs && !event->capture && event->recorded.stream && flags != WAIT_EXTERNAL)
        return invalidate(stream->capture, CAPTURE_ISOLATION);
    if (!stream->capture) { /* this is how a stream joins a capture */
        stream->capture = theirs;
        stream->captured = stream->joined = 0;
    }
    stream->captured++;
    Stream *source = theirs ? stream_of(event->recorded.stream) : NULL;
    if (source && source->joined < event->recorded.position)
        source->joined = event->recorded.position;
    return SUCCESS;
}

CUresult ask_stream(const Stream *stream)
{
    if (!stream->capture)
        return while_others_capture();
    return stream->capture->invalidated ? CAPTURE_INVALIDATED : invalidate(stream->capture, CAPTURE_UNSUPPORTED);
}

CUresult ask_event(const Event *event)
{
    Capture *capture = capture_of(event);
    return capture ? invalidate(capture, CAPTURED_EVENT) : while_others_capture();
}

/* -- begin and end ------------------------------------------------------------------------------------------------ */

static void end(Capture *capture)
{
    for (Stream *stream = streams; stream; stream = stream->next)
        if (stream->capture == capture)
            stream->capture = NULL;
    Capture **place = &captures;
    while (*place != capture)
        place = &(*place)->next;
    *place = capture->next;
    free(capture);
}

void leave_capture(Stream *stream)
{
    Capture *capture = stream->capture;
    if (!capture)
        return;
    invalidate(capture, CAPTURE_UNSUPPORTED);
    stream->capture = NULL;
    if (capture->origin == stream->identity)
        end(capture); /* nobody can end it any more */
}

API CUresult cuStreamBeginCapture_v2(CUstream handle, int mode)
{
    ENTER(IN_CONTEXT);
    Stream *stream = stream_of((uint64_t)handle);
    if (is_null(handle))
        return CAPTURE_UNSUPPORTED;
    if (!stream)
        return INVALID_HANDLE;
    if (mode < MODE_GLOBAL || mode > MODE_RELAXED)
        return INVALID_VALUE;
    if (stream->capture)
        return ILLEGAL_STATE;
    Capture *capture = malloc(sizeof *capture);
    *capture = (Capture){captures, new_identity(), stream->identity, mode, pthread_self(), false};
    captures = capture;
    stream->capture = capture;
    stream->captured = stream->joined = 0;
    return SUCCESS;
}

static bool is_joined(const Capture *capture)
{
    for (const Stream *stream = streams; stream; stream = stream->next)
        if (stream->capture == capture && stream->identity != capture->origin && stream->joined < stream->captured)
            return false;
    return true;
}

static size_t nodes_of(const Capture *capture)
{
    size_t nodes = 0;
    for (const Stream *stream = streams; stream; stream = stream->next)
        if (stream->capture == capture)
            nodes += stream->captured;
    return nodes;
}

API CUresult cuStreamEndCapture(CUstream handle, uint64_t *graph)
{
    ENTER(IN_CONTEXT);
    Stream *stream = stream_of((uint64_t)handle);
    *graph = 0;
    if (!stream || !stream->capture)
        return stream ? ILLEGAL_STATE : INVALID_HANDLE;
    Capture *capture = stream->capture;
    if (capture->origin != stream->identity)
        return invalidate(capture, CAPTURE_UNMATCHED);
    if (capture->mode != MODE_RELAXED && !pthread_equal(capture->thread, pthread_self()))
        return CAPTURE_WRONG_THREAD;
    CUresult code = capture->invalidated ? CAPTURE_INVALIDATED : is_joined(capture) ? SUCCESS : CAPTURE_UNJOINED;
    if (!code) {
        Graph *made = malloc(sizeof *made);
        *made = (Graph){graphs, new_identity(), nodes_of(capture)};
        graphs = made;
        *graph = made->identity;
    }
    end(capture);
    return code;
}

/* Does not invalidate what it asks about. */
static CUresult status_of(CUstream handle, int *status, uint64_t *identity)
{
    const Stream *stream = stream_of((uint64_t)handle);
    *status = CAPTURE_NONE;
    if (!is_null(handle) && !stream)
        return INVALID_HANDLE;
    for (const Stream *other = streams; other && !stream; other = other->next)
        if (makes_null_stream_unusable(other, current_context()))
            return CAPTURE_IMPLICIT;
    if (!stream || !stream->capture)
        return SUCCESS;
    *status = stream->capture->invalidated ? CAPTURE_IS_INVALIDATED : CAPTURE_ACTIVE;
    *identity = stream->capture->identity;
    return SUCCESS;
}

API CUresult cuStreamIsCapturing(CUstream handle, int *status)
{
    ENTER(IN_CONTEXT);
    uint64_t identity;
    return status_of(handle, status, &identity);
}

/* Status and number of the capture; its graph and its nodes are not to be had before it ends. */
static CUresult describe(CUstream handle, int *status, uint64_t *identity, uint64_t *graph, size_t *dependencies)
{
    uint64_t found = 0;
    CUresult code = status_of(handle, status, &found);
    if (identity)
        *identity = found;
    if (graph)
        *graph = 0;
    if (dependencies)
        *dependencies = 0;
    return code;
}

API CUresult cuStreamGetCaptureInfo_v2(CUstream handle, int *status, uint64_t *identity, uint64_t *graph,
                                       void **nodes, size_t *dependencies)
{
    ENTER(IN_CONTEXT);
    (void)nodes;
    return describe(handle, status, identity, graph, dependencies);
}

API CUresult cuStreamGetCaptureInfo_v3(CUstream handle, int *status, uint64_t *identity, uint64_t *graph,
                                       void **nodes, void **edges, size_t *dependencies)
{
    ENTER(IN_CONTEXT);
    (void)nodes, (void)edges;
    return describe(handle, status, identity, graph, dependencies);
}

/* Of the calling thread; no context is needed. */
API CUresult cuThreadExchangeStreamCaptureMode(int *mode)
{
    ENTER(INITIALISED);
    if (*mode < MODE_GLOBAL || *mode > MODE_RELAXED)
        return INVALID_VALUE;
    Mode before = thread_mode;
    thread_mode = (Mode)*mode;
    *mode = before;
    return SUCCESS;
}

/* -- graphs: how much was captured -------------------------------------------------------------------------------- */

static Graph **place_of(uint64_t identity)
{
    Graph **place = &graphs;
    while (*place && (*place)->identity != identity)
        place = &(*place)->next;
    return place;
}

/* The number of nodes only. */
API CUresult cuGraphGetNodes(uint64_t identity, void **nodes, size_t *count)
{
    ENTER(HEALTHY);
    const Graph *graph = *place_of(identity);
    if (!graph || nodes)
        return graph ? NOT_SUPPORTED : INVALID_VALUE;
    *count = graph->nodes;
    return SUCCESS;
}

API CUresult cuGraphDestroy(uint64_t identity)
{
    ENTER(HEALTHY);
    Graph **place = place_of(identity), *graph = *place;
    if (!graph)
        return INVALID_VALUE;
    *place = graph->next;
    free(graph);
    return SUCCESS;
}
