/* How every call begins: the log, what tests inject, fork, and what the call needs. One lock serialises all calls. */
#define _GNU_SOURCE
#include "fakecuda.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* -- the log ------------------------------------------------------------------------------------------------------ */

static char tag[LONGEST_NAME]; /* the module after -m, or else the name of the script or program */

static void set_tag(void)
{
    snprintf(tag, sizeof tag, "%.*s", LONGEST_NAME - 1, read_command());
    for (char *c = tag; *c; c++)
        if (*c == ' ')
            *c = '_';
}

/* Opened anew for each line: a descriptor kept open would be in the way of tests that count or close them. */
static void log_call(const char *name, bool after_fork)
{
    const char *path = getenv("FAKECUDA_LOG");
    if (!path || !*path || !strcmp(name, "cuGetProcAddress")) /* cuda-bindings looks some 500 functions up at once */
        return;
    char line[256];
    int length =
        snprintf(line, sizeof line, "%d %s %s%s\n", getpid(), tag, name, after_fork ? " after-fork" : "");
    int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0 || write(fd, line, (size_t)length) != length)
        fprintf(stderr, "fakecuda: cannot write to FAKECUDA_LOG=%s\n", path);
    if (fd >= 0)
        close(fd);
}

/* -- entering ----------------------------------------------------------------------------------------------------- */

static CUresult refusal_of(Needs needs)
{
    if (needs >= INITIALISED && !process.initialised_in)
        return NOT_INITIALIZED;
    if (needs >= HEALTHY && process.sticky)
        return process.sticky;
    if (needs >= IN_CONTEXT && !current_context())
        return INVALID_CONTEXT;
    if (needs >= IN_CONTEXT && !current_context()->retained)
        return CONTEXT_IS_DESTROYED;
    return SUCCESS;
}

CUresult enter_call(Call *call, const char *function, Needs needs, int gpu)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, set_tag);
    char name[LONGEST_NAME];
    strip_version(name, function);
    bool after_fork = process.initialised_in && process.initialised_in != getpid();
    log_call(name, after_fork);
    if (after_fork) /* not even the lock: another thread may have held it when this process was forked */
        return needs == ANYTIME ? SUCCESS : NOT_INITIALIZED;
    pthread_mutex_lock(&lock);
    Delay delay = delay_of(name, gpu);
    if (delay.milliseconds || delay.hangs) { /* other threads go on meanwhile */
        pthread_mutex_unlock(&lock);
        take_time(delay);
        pthread_mutex_lock(&lock);
    }
    call->locked = true;
    CUresult code = (CUresult)injected(name, gpu);
    return code ? code : refusal_of(needs);
}

void leave_call(Call *call)
{
    if (call->locked)
        pthread_mutex_unlock(&lock);
}
