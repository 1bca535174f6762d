/* Primary contexts, what they take, and the stack of current contexts. */
#define _GNU_SOURCE
#include "fakecuda.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

/* -- primary contexts: one for each device, alive while somebody retains it --------------------------------------- */

/* What a context takes of its GPU. A mapping keeps the file alive, as it does that of a block; a forked child has it. */
static bool occupy(CUcontext context, size_t bytes)
{
    int fd = memfd_create("context of a GPU", MFD_CLOEXEC);
    if (fd < 0)
        return false;
    keep_alive(fd, start_of(ALIVE_CONTEXT, context->device), bytes + 1);
    context->mapping = mmap(NULL, PAGE, PROT_NONE, MAP_SHARED, fd, 0);
    close(fd);
    return context->mapping != MAP_FAILED;
}

static bool open_descriptors(CUcontext context)
{
    int gpu = process.physical[context->device];
    int opened[CONTEXT_DESCRIPTORS] = {open_gpu_node(gpu), open_gpu_node(gpu), eventfd(0, EFD_CLOEXEC),
                                       eventfd(0, EFD_CLOEXEC)};
    memcpy(context->descriptors, opened, sizeof opened);
    for (int i = 0; i < CONTEXT_DESCRIPTORS; i++)
        if (opened[i] < 0)
            return false;
    return true;
}

static void give_back(CUcontext context)
{
    if (context->mapping != MAP_FAILED)
        munmap(context->mapping, PAGE);
    for (int i = 0; i < CONTEXT_DESCRIPTORS; i++)
        if (context->descriptors[i] >= 0)
            close(context->descriptors[i]);
}

/* Whether there is room is looked up when the context is there: the list of locks takes a descriptor itself. */
static CUresult take_memory(CUcontext context)
{
    context->mapping = MAP_FAILED;
    CUresult code = OPERATING_SYSTEM;
    if (open_descriptors(context) && occupy(context, setting("FAKECUDA_CONTEXT", 0)))
        code = bytes_alive(context->device) <= process.memory ? SUCCESS : OUT_OF_MEMORY;
    if (code)
        give_back(context);
    return code;
}

static void *handle_events(void *nothing)
{
    for (;;)
        pause();
    return nothing;
}

/* As the real driver: a thread of its own, that takes no signals, since the first context of the process. */
static void start_helper(void)
{
    static bool started;
    pthread_t thread;
    sigset_t all, before;
    if (started)
        return;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    started = !pthread_create(&thread, NULL, handle_events, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* In exclusive mode, one process has a context at a time, and in prohibited mode none. A context takes memory. */
static CUresult begin(CUcontext context)
{
    enum { PROHIBITED = 2, EXCLUSIVE_PROCESS = 3 };
    size_t mode = setting("FAKECUDA_COMPUTE_MODE", 0);
    if (mode == PROHIBITED || (mode == EXCLUSIVE_PROCESS && alive_at(start_of(ALIVE_CONTEXT, context->device)).files))
        return DEVICE_UNAVAILABLE;
    start_helper();
    return take_memory(context);
}

API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    ENTER_ON(gpu_of(device), HEALTHY);
    if (!is_device(device))
        return INVALID_DEVICE;
    CUcontext primary = &process.contexts[device];
    CUresult code = primary->retained ? SUCCESS : begin(primary);
    if (code)
        return code;
    primary->retained++;
    *context = primary;
    return SUCCESS;
}

/* The last release ends the context, and with it its streams and the memory of cuMemAlloc and cuMemHostAlloc. */
API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device)
{
    ENTER_ON(gpu_of(device), INITIALISED);
    if (!is_device(device))
        return INVALID_DEVICE;
    CUcontext context = &process.contexts[device];
    if (!context->retained)
        return INVALID_CONTEXT;
    if (--context->retained == 0) {
        destroy_streams_of(context);
        remove_ranges_of(context);
        give_back(context);
    }
    return SUCCESS;
}

API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active)
{
    ENTER_ON(gpu_of(device), INITIALISED);
    if (!is_device(device))
        return INVALID_DEVICE;
    *flags = 0;
    *active = process.contexts[device].retained > 0;
    return SUCCESS;
}

/* -- the current context: a stack in each thread ------------------------------------------------------------------ */

enum { DEEPEST_STACK = 64 };
static _Thread_local CUcontext stack[DEEPEST_STACK];
static _Thread_local int depth;

bool is_context(CUcontext context)
{
    for (CUdevice device = 0; device < process.device_count; device++)
        if (context == &process.contexts[device])
            return context->retained > 0;
    return false;
}

CUcontext current_context(void)
{
    return depth ? stack[depth - 1] : NULL;
}

API CUresult cuCtxGetCurrent(CUcontext *context)
{
    ENTER(INITIALISED);
    *context = current_context();
    return SUCCESS;
}

/* Replaces the top of the stack; NULL takes it off. */
API CUresult cuCtxSetCurrent(CUcontext context)
{
    ENTER(INITIALISED);
    if (context && !is_context(context))
        return INVALID_CONTEXT;
    if (depth)
        depth--;
    if (context)
        stack[depth++] = context;
    return SUCCESS;
}

API CUresult cuCtxPushCurrent_v2(CUcontext context)
{
    ENTER(INITIALISED);
    if (!is_context(context))
        return INVALID_CONTEXT;
    if (depth == DEEPEST_STACK)
        return OUT_OF_MEMORY;
    stack[depth++] = context;
    return SUCCESS;
}

API CUresult cuCtxPopCurrent_v2(CUcontext *context)
{
    ENTER(INITIALISED);
    if (!depth)
        return INVALID_CONTEXT;
    depth--;
    if (context)
        *context = stack[depth];
    return SUCCESS;
}

API CUresult cuCtxGetDevice(CUdevice *device)
{
    ENTER(INITIALISED);
    if (!current_context())
        return INVALID_CONTEXT;
    *device = current_context()->device;
    return SUCCESS;
}
