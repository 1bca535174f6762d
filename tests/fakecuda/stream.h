/* Streams, events and captures: what stream.c and capture.c share. */
#ifndef FAKECUDA_STREAM_H
#define FAKECUDA_STREAM_H

#include "fakecuda.h"

#include <pthread.h>

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

typedef struct Capture {
    struct Capture *next;
    uint64_t identity;
    uint64_t origin; /* the stream in which it began */
    int mode;
    pthread_t thread;
    bool invalidated;
} Capture;

typedef struct Stream {
    struct Stream *next;
    uint64_t identity;
    CUcontext context;
    unsigned flags;
    Work *first, **end;
    uint64_t enqueued, done;
    bool asked; /* cuStreamQuery has said NOT_READY */
    Capture *capture; /* NULL: its work is done, not captured */
    uint64_t captured; /* pieces of work in the graph */
    uint64_t joined; /* so many of them come before work of another stream of the capture */
} Stream;

typedef struct Event {
    struct Event *next;
    uint64_t identity;
    CUcontext context;
    Point recorded;
    uint64_t capture; /* recorded in this one, 0: in none; then the position is that of captured work */
    bool asked;
} Event;

extern Stream *streams;

bool is_null(CUstream handle);
Stream *stream_of(uint64_t identity);

CUresult invalidate(Capture *capture, CUresult reason); /* returns the reason */
CUresult capture_work(Stream *stream, const Transfer *transfer);
CUresult capture_record(Stream *stream, Event *event);
CUresult capture_wait(Stream *stream, const Event *event, unsigned flags); /* where stream or event is being captured */
CUresult ask_stream(const Stream *stream); /* before a stream is waited for or queried */
CUresult ask_event(const Event *event);
Capture *capture_of(const Event *event); /* NULL where it has ended, or there was none */
void leave_capture(Stream *stream); /* before it is destroyed */

#endif
