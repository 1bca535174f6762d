/* This process: settings, cuInit, errors by name, and the lookup of functions by name. */
#define _GNU_SOURCE
#include "fakecuda.h"

#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

Process process;

enum { DEFAULT_VERSION = 13000 };

/* Handles count up and are never used twice, so that a stale one is always refused. They are far from the small
 * numbers that mean the default streams. */
uint64_t new_identity(void)
{
    static uint64_t last = 0x10000;
    return ++last;
}

bool is_device(CUdevice device)
{
    return device >= 0 && device < process.device_count;
}

/* The physical GPU that this process calls `device`. */
int gpu_of(CUdevice device)
{
    return is_device(device) ? process.physical[device] : NO_GPU;
}

int current_gpu(void)
{
    return current_context() ? gpu_of(current_context()->device) : NO_GPU;
}

/* -- devices ------------------------------------------------------------------------------------------------------ */

API CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device)
{
    ENTER_ON(gpu_of(device), INITIALISED);
    if (!is_device(device))
        return INVALID_DEVICE;
    *uuid = visible_uuid(process.physical[device]);
    return SUCCESS;
}

/* The device that an item of CUDA_VISIBLE_DEVICES names: an index, or the beginning of one UUID. -1: none. */
static int physical_named(const char *item)
{
    const char *prefix = is_mig() ? "MIG-" : "GPU-";
    if (strncmp(item, prefix, strlen(prefix)) != 0) {
        char *end;
        long index = strtol(item, &end, 10);
        return end != item && !*end && index >= 0 && index < gpu_count() ? (int)index : -1;
    }
    int found = -1;
    for (int physical = 0; physical < gpu_count(); physical++) {
        char text[LONGEST_UUID];
        write_uuid(text, prefix, visible_uuid(physical));
        if (strncasecmp(item, text, strlen(item)) == 0) {
            if (found >= 0)
                return -1;
            found = physical;
        }
    }
    return found;
}

/* As the real driver: devices in the order named, up to the first item that names none, or one again. */
static void find_visible_devices(void)
{
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    process.device_count = 0;
    if (!visible) {
        for (int physical = 0; physical < gpu_count(); physical++)
            process.physical[process.device_count++] = physical;
        return;
    }
    char *items = strdup(visible), *rest = items, *item;
    while ((item = strsep(&rest, ",")) != NULL) {
        int physical = physical_named(item);
        for (int i = 0; i < process.device_count; i++)
            if (process.physical[i] == physical)
                physical = -1;
        if (physical < 0)
            break;
        process.physical[process.device_count++] = physical;
    }
    free(items);
}

enum { MOST_DESCRIPTORS = MOST_DEVICES + 3 };

static CUresult open_devices(int descriptors[MOST_DESCRIPTORS], int *count)
{
    if ((descriptors[(*count)++] = open_shared_node(NODE_CONTROL)) < 0)
        return errno == EMFILE ? OPERATING_SYSTEM : NO_DEVICE;
    if ((descriptors[(*count)++] = open_shared_node(NODE_MEMORY)) < 0)
        return errno == EMFILE ? OPERATING_SYSTEM : UNKNOWN;
    if ((descriptors[(*count)++] = memfd_create("of the driver", MFD_CLOEXEC)) < 0)
        return OPERATING_SYSTEM;
    for (CUdevice device = 0; device < process.device_count; device++) {
        int physical = process.physical[device], node = open_gpu_node(physical);
        if ((descriptors[(*count)++] = node) < 0)
            return errno == EMFILE ? OPERATING_SYSTEM : NO_DEVICE;
        process.life[physical] = gpu_life(physical, node);
    }
    return SUCCESS;
}

/* As the real driver: it keeps descriptors of its nodes, since 570 also of a memfd, until the process ends. */
static CUresult keep_devices_open(void)
{
    int descriptors[MOST_DESCRIPTORS], count = 0;
    CUresult code = open_devices(descriptors, &count);
    while (code && count--)
        if (descriptors[count] >= 0)
            close(descriptors[count]);
    return code;
}

API CUresult cuInit(unsigned flags)
{
    ENTER(FIRST);
    if (flags)
        return INVALID_VALUE;
    if (process.initialised_in)
        return SUCCESS;
    process.memory = setting("FAKECUDA_MEM", DEFAULT_MEMORY);
    process.granularity = setting("FAKECUDA_GRAN", DEFAULT_GRANULARITY);
    find_visible_devices();
    if (!process.device_count)
        return NO_DEVICE;
    CUresult code = keep_devices_open();
    if (code)
        return code;
    for (CUdevice device = 0; device < process.device_count; device++)
        process.contexts[device].device = device;
    process.initialised_in = getpid();
    return SUCCESS;
}

API CUresult cuDriverGetVersion(int *version)
{
    ENTER(ANYTIME);
    *version = (int)setting("FAKECUDA_VERSION", DEFAULT_VERSION);
    return SUCCESS;
}

/* -- errors by name ----------------------------------------------------------------------------------------------- */

static const struct {
    CUresult code;
    const char *name, *text;
} errors[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {DEVICE_UNAVAILABLE, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE",
     "the operation cannot be performed in the present state"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "part or all of the requested memory range is already mapped"},
    {HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "pointer does not correspond to a registered memory region"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {802, "CUDA_ERROR_SYSTEM_NOT_READY", "system not yet initialized"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {CAPTURE_MERGE, "CUDA_ERROR_STREAM_CAPTURE_MERGE",
     "operation would result in a merge of separate capture sequences"},
    {CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began"},
    {CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED",
     "capturing stream has unjoined work"},
    {CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
     "dependency created on uncaptured work in another stream"},
    {CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT",
     "operation not permitted on an event last recorded in a capturing stream"},
    {CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
     "attempt to terminate a thread-local capture sequence from another thread"},
    {UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

API CUresult cuGetErrorName(CUresult code, const char **name)
{
    ENTER(ANYTIME);
    *name = NULL;
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code)
            *name = errors[i].name;
    return *name ? SUCCESS : INVALID_VALUE;
}

API CUresult cuGetErrorString(CUresult code, const char **text)
{
    ENTER(ANYTIME);
    *text = NULL;
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code)
            *text = errors[i].text;
    return *text ? SUCCESS : INVALID_VALUE;
}

/* -- functions by name -------------------------------------------------------------------------------------------- */

/* The newest version of a function that this library has and that a program built for CUDA `version` knows. */
static void *find_version(const char *name, int version)
{
    static const struct {
        const char *suffix;
        int since;
    } versions[] = {{"_v3", 12030}, {"_v2", 0}, {"", 0}};
    Dl_info here;
    if (!dladdr((void *)&process, &here))
        return NULL;
    void *library = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD), *function = NULL;
    for (size_t i = 0; i < sizeof versions / sizeof *versions && !function; i++) {
        char versioned[128];
        snprintf(versioned, sizeof versioned, "%s%s", name, versions[i].suffix);
        function = version >= versions[i].since ? dlsym(library, versioned) : NULL;
    }
    dlclose(library);
    return function;
}

/* By a name without version. */
void *find_function(const char *name)
{
    return find_version(name, INT_MAX);
}

/* For rules; one for NVML means nothing here. */
bool is_function(const char *name)
{
    return !strncmp(name, "nvml", 4) || find_function(name);
}

API CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status)
{
    enum { FOUND = 0, SYMBOL_NOT_FOUND = 1 };
    ENTER(ANYTIME);
    (void)flags;
    *function = find_version(name, version);
    if (status)
        *status = *function ? FOUND : SYMBOL_NOT_FOUND;
    return *function ? SUCCESS : NOT_FOUND;
}
