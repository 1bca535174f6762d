/* Legacy CUDA IPC: whole blocks of cuMemAlloc, always writable, named by 64 bytes. They name the exporter's descriptor,
 * which the opener finds below /proc, so a handle is worth nothing once its exporter has freed the memory or died. */
#define _GNU_SOURCE
#include "fakecuda.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { LAZY_ENABLE_PEER_ACCESS = 1 };

typedef struct {
    char magic[8];
    uint64_t pid;
    uint64_t fd;
    uint64_t inode; /* of one allocation only, also when pid and fd come again */
} Name;

static const char magic[8] = "fakeipc";

API CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr address)
{
    ENTER(IN_CONTEXT);
    if (setting("FAKECUDA_NO_IPC", 0))
        return NOT_SUPPORTED;
    const Range *range = range_around(address);
    if (!range || range->kind != RANGE_PLAIN) /* memory of cuMemCreate, or opened from somebody else */
        return INVALID_VALUE;
    Name name = {.pid = (uint64_t)getpid(), .fd = (uint64_t)range->block->fd, .inode = range->block->inode};
    memcpy(name.magic, magic, sizeof magic);
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &name, sizeof name);
    return SUCCESS;
}

static Range *opened_before(uint64_t inode)
{
    for (Range *range = ranges; range; range = range->next)
        if (range->kind == RANGE_IPC && range->block->inode == inode)
            return range;
    return NULL;
}

/* The whole block, whatever part of it was exported. */
static CUresult open_block(CUdeviceptr *address, const Name *name)
{
    char path[64];
    struct stat status;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)name->pid, (int)name->fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return INVALID_VALUE;
    if (fstat(fd, &status) || status.st_ino != name->inode) {
        close(fd);
        return INVALID_VALUE;
    }
    Block *block;
    CUresult code = adopt_block(&block, fd);
    if (code)
        return code;
    void *start = mmap(NULL, block->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (start == MAP_FAILED) {
        release_handle(block);
        return OUT_OF_MEMORY;
    }
    keep_block_alive(fd, block); /* the memory outlives its exporter */
    *address = (CUdeviceptr)start;
    add_range((Range){.kind = RANGE_IPC, .address = *address, .size = block->size, .block = block,
                      .context = current_context(), .opened = 1});
    release_handle(block); /* the mapping alone keeps it open: of a killed process, that ends with a lease's mapping */
    return SUCCESS;
}

API CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *address, CUipcMemHandle handle, unsigned flags)
{
    ENTER(IN_CONTEXT);
    if (setting("FAKECUDA_NO_IPC", 0))
        return NOT_SUPPORTED;
    Name name;
    memcpy(&name, &handle, sizeof name);
    if (flags != LAZY_ENABLE_PEER_ACCESS || memcmp(name.magic, magic, sizeof magic) != 0)
        return INVALID_VALUE;
    REFUSED_BY(while_others_capture());
    if (name.pid == (uint64_t)getpid()) /* what one has exported, one cannot open */
        return INVALID_CONTEXT;
    Range *range = opened_before(name.inode);
    if (!range)
        return open_block(address, &name);
    range->opened++;
    *address = range->address;
    return SUCCESS;
}

API CUresult cuIpcCloseMemHandle(CUdeviceptr address)
{
    ENTER(IN_CONTEXT);
    Range *range = find_range(RANGE_IPC, address);
    if (!range)
        return INVALID_VALUE;
    REFUSED_BY(while_others_capture());
    if (--range->opened == 0)
        remove_range(range);
    return SUCCESS;
}
