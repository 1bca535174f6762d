/* Physical memory: one memfd for each allocation.
 *
 * Everything that keeps device memory alive keeps the memfd's open file alive here: handles, exported descriptors, also
 * those that lie in a socket, and mappings. Its name tells an importer what it is. A lock on the open file tells the
 * whole machine that it is alive: /proc/locks then lists exactly the memory that exists, whoever was killed. */
#define _GNU_SOURCE
#include "fakecuda.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static Block *blocks;

static const char *const kind_names[] = {[BLOCK_VMM] = "vmm", [BLOCK_PLAIN] = "plain"};

uint64_t start_of(AliveKind kind, CUdevice device)
{
    int gpu = process.physical[device];
    return alive_start(kind, gpu, process.life[gpu]);
}

/* Lets an open file count as device memory that is alive. */
void keep_block_alive(int fd, const Block *block)
{
    keep_alive(fd, start_of(ALIVE_MEMORY, block->device), block->size);
}

/* Whether CUDA IPC has our block open: then its file is open a second time, and that open file has a lock of its own. */
bool is_open_elsewhere(const Block *block)
{
    struct flock other = {.l_type = F_WRLCK, .l_whence = SEEK_SET,
                          .l_start = (off_t)start_of(ALIVE_MEMORY, block->device), .l_len = (off_t)block->size};
    if (fcntl(block->fd, F_OFD_GETLK, &other)) {
        perror("fakecuda: cannot ask for the locks of a memfd");
        abort();
    }
    return other.l_type != F_UNLCK;
}

/* Bytes that are used on a device, by all processes. */
size_t bytes_alive(CUdevice device)
{
    int gpu = process.physical[device];
    return used_bytes(gpu, process.life[gpu]);
}

static bool has_room(CUdevice device, size_t size)
{
    return size <= process.memory && bytes_alive(device) <= process.memory - size;
}

static CUresult add_block(Block **block, Block fields)
{
    struct stat status;
    fstat(fields.fd, &status);
    *block = malloc(sizeof **block);
    **block = fields;
    (*block)->identity = new_identity() * MOST_DEVICES + (uint64_t)process.physical[fields.device];
    (*block)->inode = status.st_ino;
    (*block)->next = blocks;
    blocks = *block;
    return SUCCESS;
}

CUresult new_block(Block **block, BlockKind kind, CUdevice device, int handle_types, size_t size)
{
    if (!has_room(device, size))
        return OUT_OF_MEMORY;
    char name[64];
    int gpu = process.physical[device];
    snprintf(name, sizeof name, "fakecuda.m%u.d%d.l%u.r%d.%s", machine_number(), gpu, process.life[gpu], handle_types,
             kind_names[kind]);
    int fd = memfd_create(name, MFD_CLOEXEC);
    if (fd < 0)
        return OUT_OF_MEMORY;
    if (ftruncate(fd, (off_t)size)) {
        close(fd);
        return OUT_OF_MEMORY;
    }
    Block fields = {.kind = kind, .device = device, .handle_types = handle_types, .fd = fd, .size = size, .handles = 1};
    keep_block_alive(fd, &fields);
    return add_block(block, fields);
}

static bool is_visible(int physical)
{
    for (CUdevice device = 0; device < process.device_count; device++)
        if (process.physical[device] == physical)
            return true;
    return false;
}

/* Memory of another process, by a descriptor of ours. INVALID_VALUE: it is none, or its GPU went down since.
 * INVALID_DEVICE: not visible here. */
CUresult adopt_block(Block **block, int fd)
{
    char path[64], link[128] = "", kind[16];
    unsigned machine, life;
    int physical, handle_types;
    struct stat status;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (readlink(path, link, sizeof link - 1) < 0 || fstat(fd, &status) ||
        sscanf(link, "/memfd:fakecuda.m%u.d%d.l%u.r%d.%15s", &machine, &physical, &life, &handle_types, kind) != 5 ||
        machine != machine_number()) {
        close(fd);
        return INVALID_VALUE;
    }
    for (CUdevice device = 0; device < process.device_count; device++)
        if (process.physical[device] == physical && process.life[physical] == life)
            return add_block(block, (Block){
                .kind = strcmp(kind, kind_names[BLOCK_VMM]) ? BLOCK_PLAIN : BLOCK_VMM, .device = device,
                .handle_types = handle_types, .fd = fd, .size = (size_t)status.st_size, .handles = 1});
    close(fd);
    return is_visible(physical) ? INVALID_VALUE : INVALID_DEVICE;
}

/* Whether this is the open file that was exported. Opening /proc/PID/fd/N makes a new one: with the real driver that
 * opens the device, and there is nothing to import from it. The lock of the true one stands against a new one's. */
bool is_first_hand(int fd)
{
    struct flock any = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = (off_t)1 << ALIVE_MEMORY, .l_len = 0};
    return fcntl(fd, F_OFD_GETLK, &any) == 0 && any.l_type == F_UNLCK;
}

/* The physical GPU that an allocation is on; its handle says so, to whoever may not look it up. */
int gpu_of_handle(CUmemGenericAllocationHandle handle)
{
    return (int)(handle % MOST_DEVICES);
}

Block *find_block(CUmemGenericAllocationHandle identity)
{
    for (Block *block = blocks; block; block = block->next)
        if (block->identity == identity && block->handles)
            return block;
    return NULL;
}

static void forget_if_unused(Block *block)
{
    if (block->handles || block->mappings)
        return;
    Block **place = &blocks;
    while (*place != block)
        place = &(*place)->next;
    *place = block->next;
    free(block);
}

/* A mapping alone keeps the open file alive: as with the real driver, it costs the process no descriptor. */
void release_handle(Block *block)
{
    if (--block->handles == 0) {
        close(block->fd);
        block->fd = -1;
    }
    forget_if_unused(block);
}

void release_mapping(Block *block)
{
    block->mappings--;
    forget_if_unused(block);
}
