/* What the parts of the fake driver share: the driver's numbers and structures, this process's state, and how a call
 * begins. The numbers and layouts are those of the public driver API (cuda.h, CUDA 13), typed by hand: no CUDA header
 * is needed to build. README.md says what is modelled and what is not. */
#ifndef FAKECUDA_H
#define FAKECUDA_H

#include "machine.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))

/* -- the driver's numbers ----------------------------------------------------------------------------------------- */

typedef enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    DEVICE_UNAVAILABLE = 46,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    OPERATING_SYSTEM = 304,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    CONTEXT_IS_DESTROYED = 709,
    HOST_MEMORY_ALREADY_REGISTERED = 712,
    HOST_MEMORY_NOT_REGISTERED = 713,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_MERGE = 902,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_UNJOINED = 904,
    CAPTURE_ISOLATION = 905,
    CAPTURE_IMPLICIT = 906,
    CAPTURED_EVENT = 907,
    CAPTURE_WRONG_THREAD = 908,
    UNKNOWN = 999,
} CUresult;

typedef int CUdevice; /* an ordinal: what this process calls the device */
typedef uint64_t CUdeviceptr; /* here a host address, too */
typedef uint64_t CUmemGenericAllocationHandle;
typedef struct Context *CUcontext;
typedef struct Stream *CUstream; /* not a pointer here: an identity, see new_identity() */
typedef struct Event *CUevent; /* likewise */

enum { LOCATION_DEVICE = 1 };
enum { ALLOCATION_PINNED = 1 };
enum { HANDLE_POSIX_FD = 1 };
enum { ACCESS_NONE = 0, ACCESS_READ = 1, ACCESS_READ_WRITE = 3 };
enum { MEMORY_HOST = 1, MEMORY_DEVICE = 2 };

typedef struct {
    int type;
    int id;
} CUmemLocation;

typedef struct {
    int type;
    int requested_handle_types;
    CUmemLocation location;
    void *win32_metadata;
    uint8_t compression_type;
    uint8_t gpu_direct_rdma_capable;
    uint16_t usage;
    uint8_t reserved[4];
} CUmemAllocationProp;

typedef struct {
    CUmemLocation location;
    int flags;
} CUmemAccessDesc;

typedef struct {
    char bytes[64];
} CUipcMemHandle;

_Static_assert(sizeof(CUmemAllocationProp) == 32, "the layout of CUmemAllocationProp");
_Static_assert(sizeof(CUmemAccessDesc) == 12, "the layout of CUmemAccessDesc");

/* -- this process ------------------------------------------------------------------------------------------------- */

enum { PAGE = 4096, ALLOCATION_UNIT = 512, CONTEXT_DESCRIPTORS = 4 };

typedef struct Context { /* the primary context of a device */
    CUdevice device;
    int retained;
    void *mapping; /* keeps what the context costs alive */
    int descriptors[CONTEXT_DESCRIPTORS]; /* which the driver keeps for it */
} Context;

typedef struct {
    int initialised_in; /* the process that called cuInit, 0 before */
    int device_count;
    int physical[MOST_DEVICES]; /* ordinal -> physical index */
    unsigned life[MOST_DEVICES]; /* of each physical GPU that is visible: since cuInit it cannot go down */
    Context contexts[MOST_DEVICES];
    size_t memory; /* bytes of each device */
    size_t granularity;
    CUresult sticky; /* what every call returns after a fault of the device */
} Process;

extern Process process;

bool is_device(CUdevice device);
int gpu_of(CUdevice device);
bool can_reach(CUdevice device, CUdevice peer);
uint64_t new_identity(void);
CUcontext current_context(void);
bool is_context(CUcontext context);

/* -- how a call begins: the first line of every exported function ------------------------------------------------- */

typedef enum {
    ANYTIME, /* works before cuInit and after fork */
    FIRST, /* cuInit itself */
    INITIALISED, /* asks about devices: works after a fault as well */
    HEALTHY, /* refused with the sticky error after a fault */
    IN_CONTEXT, /* needs a current context on top of that */
} Needs;

typedef struct {
    bool locked;
} Call;

CUresult enter_call(Call *call, const char *function, Needs needs, int gpu);
void leave_call(Call *call);

/* Logs the call, injects what a test asks for, checks what the call needs, and holds the one lock until the function
 * returns. `gpu` is the one that the call is about, for rules that name one. */
#define ENTER_ON(gpu, needs)                                                                                          \
    __attribute__((cleanup(leave_call))) Call call = {false};                                                         \
    CUresult refusal = enter_call(&call, __func__, needs, gpu);                                                       \
    if (refusal)                                                                                                      \
        return refusal

#define ENTER(needs) ENTER_ON(current_gpu(), needs)

int current_gpu(void); /* that of the current context */
void *find_function(const char *name);

/* -- physical memory: one memfd for each allocation (physical.c) -------------------------------------------------- */

typedef enum { BLOCK_VMM, BLOCK_PLAIN } BlockKind; /* cuMemCreate, cuMemAlloc */

typedef struct Block {
    struct Block *next;
    CUmemGenericAllocationHandle identity;
    BlockKind kind;
    CUdevice device;
    int handle_types;
    int fd; /* -1 once no handle is left */
    uint64_t inode;
    size_t size;
    int handles;
    int mappings;
} Block;

CUresult new_block(Block **block, BlockKind kind, CUdevice device, int handle_types, size_t size);
CUresult adopt_block(Block **block, int fd); /* takes the descriptor */
Block *find_block(CUmemGenericAllocationHandle identity);
void release_handle(Block *block);
void release_mapping(Block *block);
bool is_first_hand(int fd);
void keep_block_alive(int fd, const Block *block);
int gpu_of_handle(CUmemGenericAllocationHandle handle);
uint64_t start_of(AliveKind kind, CUdevice device);
size_t bytes_alive(CUdevice device);
bool is_open_elsewhere(const Block *block);

/* -- virtual memory (ranges.c) ------------------------------------------------------------------------------------ */

typedef enum {
    RANGE_RESERVED, /* cuMemAddressReserve; other ranges lie inside */
    RANGE_VMM, /* cuMemMap */
    RANGE_PLAIN, /* cuMemAlloc */
    RANGE_IPC, /* cuIpcOpenMemHandle */
    RANGE_HOST, /* cuMemHostAlloc */
    RANGE_REGISTERED, /* cuMemHostRegister */
} RangeKind;

typedef struct Range {
    struct Range *next;
    RangeKind kind;
    CUdeviceptr address;
    size_t size;
    Block *block; /* NULL where no device memory is behind it */
    CUcontext context; /* dies with it; NULL for VMM */
    int access[MOST_DEVICES]; /* RANGE_VMM: of each device of this process */
    int opened; /* RANGE_IPC: how often */
} Range;

extern Range *ranges;

void add_range(Range range);
Range *find_range(RangeKind kind, CUdeviceptr address); /* by its first address */
Range *range_around(CUdeviceptr address); /* what is mapped there; no reservation */
bool overlaps(const Range *range, CUdeviceptr address, size_t size);
void remove_range(Range *range); /* unmaps, too */
void remove_ranges_of(CUcontext context);
bool is_device_memory(CUdeviceptr address, size_t size);
bool is_accessible(CUdeviceptr address, size_t size, CUdevice device, int access);
int access_of(const Range *range, CUdevice device);
bool is_pinned(const void *address, size_t size);

/* -- work of the device (memory.c, stream.c) ---------------------------------------------------------------------- */

typedef enum { HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, FILL } TransferKind;

typedef struct {
    TransferKind kind;
    CUdevice device, reader; /* whose engines do it: the same one's, but for a copy between peers */
    bool is_between_peers;
    uint64_t destination;
    uint64_t source;
    size_t size;
    uint8_t value; /* FILL */
    bool pinned; /* the host's side was pinned when it was enqueued, and must still be */
} Transfer;

void perform(const Transfer *transfer);
CUresult do_now(Transfer transfer); /* in the NULL stream */
CUresult enqueue(CUstream stream, Transfer transfer);
void run_blocking_streams(CUcontext context);
void destroy_streams_of(CUcontext context);

/* -- graphs being captured (capture.c): what these refuse, and thereby invalidates the captures --------------------- */

CUresult while_others_capture(void); /* "potentially unsafe" calls, as the mode of the thread and of the captures says */
CUresult wait_for_context(CUcontext context); /* calls that synchronise the whole context: in every mode */
CUresult use_null_stream(CUcontext context); /* as blocking streams of the context depend on it */

/* The first lines of a call that cannot be made during some captures. */
#define REFUSED_BY(check)                                                                                             \
    do {                                                                                                              \
        CUresult captured = (check);                                                                                  \
        if (captured)                                                                                                 \
            return captured;                                                                                          \
    } while (0)

#endif
