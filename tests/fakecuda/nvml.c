/* A libnvidia-ml.so.1 for the same GPUs. It sees all of them, whatever CUDA_VISIBLE_DEVICES says, and keeps descriptors:
 * that of nvidiactl from the first nvmlInit on, those of a GPU from its first handle on, until the last nvmlShutdown. */
#define _GNU_SOURCE
#include "machine.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))

typedef enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    DRIVER_NOT_LOADED = 9,
} nvmlReturn;

typedef struct {
    int gpu;
    bool is_instance; /* a MIG instance, not the GPU that it is a part of */
} Handle;
typedef const Handle *nvmlDevice;

typedef struct {
    unsigned long long total, free, used;
} nvmlMemory;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int initialised; /* so many times */
static int control = -1;
static int nodes[MOST_DEVICES];
static Handle handles[2][MOST_DEVICES]; /* GPUs, instances */

/* -- how every call begins ---------------------------------------------------------------------------------------- */

static int enter_call(bool *locked, const char *function, bool needs_init)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, (void (*)(void))read_command);
    char name[LONGEST_NAME];
    strip_version(name, function);
    pthread_mutex_lock(&lock);
    Delay delay = delay_of(name, NO_GPU);
    if (delay.milliseconds || delay.hangs) {
        pthread_mutex_unlock(&lock);
        take_time(delay);
        pthread_mutex_lock(&lock);
    }
    *locked = true;
    int code = injected(name, NO_GPU);
    return code ? code : needs_init && !initialised ? UNINITIALIZED : SUCCESS;
}

static void leave_call(bool *locked)
{
    if (*locked)
        pthread_mutex_unlock(&lock);
}

#define ENTER(needs_init)                                                                                             \
    __attribute__((cleanup(leave_call))) bool locked = false;                                                         \
    int refusal = enter_call(&locked, __func__, needs_init);                                                          \
    if (refusal)                                                                                                      \
        return refusal

/* A rule for the driver means nothing here. */
bool is_function(const char *name)
{
    static const char *const versions[] = {"", "_v2"};
    Dl_info here;
    if (!strncmp(name, "cu", 2) || !dladdr((void *)&lock, &here))
        return true;
    void *library = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD), *function = NULL;
    for (size_t i = 0; i < 2 && !function; i++) {
        char versioned[2 * LONGEST_NAME];
        snprintf(versioned, sizeof versioned, "%s%s", name, versions[i]);
        function = dlsym(library, versioned);
    }
    dlclose(library);
    return function;
}

/* -- begin and end ------------------------------------------------------------------------------------------------ */

static int begin(void)
{
    if (!initialised && (control = open_shared_node(NODE_CONTROL)) < 0)
        return DRIVER_NOT_LOADED;
    for (int gpu = 0; gpu < MOST_DEVICES && !initialised; gpu++) {
        nodes[gpu] = -1;
        handles[0][gpu] = (Handle){gpu, false};
        handles[1][gpu] = (Handle){gpu, true};
    }
    initialised++;
    return SUCCESS;
}

API int nvmlInitWithFlags(unsigned flags)
{
    ENTER(false);
    (void)flags;
    return begin();
}

API int nvmlInit_v2(void)
{
    ENTER(false);
    return begin();
}

API int nvmlShutdown(void)
{
    ENTER(true);
    if (--initialised)
        return SUCCESS;
    close(control);
    for (int gpu = 0; gpu < MOST_DEVICES; gpu++)
        if (nodes[gpu] >= 0)
            close(nodes[gpu]);
    return SUCCESS;
}

API const char *nvmlErrorString(int code)
{
    static _Thread_local char text[LONGEST_NAME];
    snprintf(text, sizeof text, "error %d of the fake NVML", code);
    return text;
}

API int nvmlSystemGetDriverVersion(char *text, unsigned length)
{
    ENTER(true);
    snprintf(text, length, "fakecuda");
    return SUCCESS;
}

/* -- devices ------------------------------------------------------------------------------------------------------ */

static int attach(nvmlDevice *device, int gpu, bool is_instance)
{
    if (nodes[gpu] < 0 && (nodes[gpu] = open_gpu_node(gpu)) < 0)
        return NOT_FOUND;
    *device = &handles[is_instance][gpu];
    return SUCCESS;
}

API int nvmlDeviceGetCount_v2(unsigned *count)
{
    ENTER(true);
    *count = (unsigned)gpu_count();
    return SUCCESS;
}

API int nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice *device)
{
    ENTER(true);
    return index < (unsigned)gpu_count() ? attach(device, (int)index, false) : INVALID_ARGUMENT;
}

/* GPU-… of a GPU, and MIG-… of an instance, which the driver calls by the same bytes. */
API int nvmlDeviceGetHandleByUUID(const char *wanted, nvmlDevice *device)
{
    ENTER(true);
    for (int gpu = 0; gpu < gpu_count(); gpu++) {
        char whole[LONGEST_UUID], instance[LONGEST_UUID];
        write_uuid(whole, "GPU-", gpu_uuid(gpu));
        write_uuid(instance, "MIG-", visible_uuid(gpu));
        if (!strcmp(wanted, whole) || (is_mig() && !strcmp(wanted, instance)))
            return attach(device, gpu, *wanted == 'M');
    }
    return NOT_FOUND;
}

API int nvmlDeviceGetUUID(nvmlDevice device, char *text, unsigned length)
{
    ENTER(true);
    char uuid[LONGEST_UUID];
    write_uuid(uuid, device->is_instance ? "MIG-" : "GPU-",
               device->is_instance ? visible_uuid(device->gpu) : gpu_uuid(device->gpu));
    snprintf(text, length, "%s", uuid);
    return SUCCESS;
}

API int nvmlDeviceGetName(nvmlDevice device, char *text, unsigned length)
{
    ENTER(true);
    snprintf(text, length, "FakeCUDA device %d", device->gpu);
    return SUCCESS;
}

API int nvmlDeviceGetIndex(nvmlDevice device, unsigned *index)
{
    ENTER(true);
    *index = (unsigned)device->gpu;
    return device->is_instance ? NOT_SUPPORTED : SUCCESS;
}

/* N of /dev/nvidiaN. An instance has none: its GPU is asked. */
API int nvmlDeviceGetMinorNumber(nvmlDevice device, unsigned *minor)
{
    ENTER(true);
    *minor = (unsigned)device->gpu;
    return device->is_instance ? NOT_SUPPORTED : SUCCESS;
}

API int nvmlDeviceGetMemoryInfo(nvmlDevice device, nvmlMemory *memory)
{
    ENTER(true);
    size_t used = used_bytes(device->gpu, gpu_life(device->gpu, nodes[device->gpu]));
    memory->total = setting("FAKECUDA_MEM", DEFAULT_MEMORY);
    memory->used = used < memory->total ? used : memory->total;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

API int nvmlDeviceGetComputeMode(nvmlDevice device, unsigned *mode)
{
    ENTER(true);
    (void)device;
    *mode = (unsigned)setting("FAKECUDA_COMPUTE_MODE", 0);
    return SUCCESS;
}

/* With nodes, a GPU goes down when nobody has its node open, as it does without persistence mode. */
API int nvmlDeviceGetPersistenceMode(nvmlDevice device, unsigned *mode)
{
    ENTER(true);
    (void)device;
    *mode = getenv("FAKECUDA_NODES") == NULL;
    return SUCCESS;
}

/* -- MIG ---------------------------------------------------------------------------------------------------------- */

API int nvmlDeviceGetMigMode(nvmlDevice device, unsigned *now, unsigned *pending)
{
    ENTER(true);
    (void)device;
    *now = *pending = is_mig();
    return SUCCESS;
}

API int nvmlDeviceIsMigDeviceHandle(nvmlDevice device, unsigned *is_instance)
{
    ENTER(true);
    *is_instance = device->is_instance;
    return SUCCESS;
}

API int nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice device, unsigned index, nvmlDevice *instance)
{
    ENTER(true);
    return is_mig() && !index && !device->is_instance ? attach(instance, device->gpu, true) : NOT_FOUND;
}

API int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDevice instance, nvmlDevice *device)
{
    ENTER(true);
    return instance->is_instance ? attach(device, instance->gpu, false) : INVALID_ARGUMENT;
}
