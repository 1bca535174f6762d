/* Virtual memory of this process: what the driver knows by its address. Addresses of the device are host addresses. */
#define _GNU_SOURCE
#include "fakecuda.h"

#include <stdlib.h>
#include <sys/mman.h>

Range *ranges;

void add_range(Range range)
{
    Range *added = malloc(sizeof *added);
    *added = range;
    added->next = ranges;
    ranges = added;
    if (range.block)
        range.block->mappings++;
}

Range *find_range(RangeKind kind, CUdeviceptr address)
{
    for (Range *range = ranges; range; range = range->next)
        if (range->kind == kind && range->address == address)
            return range;
    return NULL;
}

bool overlaps(const Range *range, CUdeviceptr address, size_t size)
{
    return address < range->address + range->size && range->address < address + size;
}

Range *range_around(CUdeviceptr address)
{
    for (Range *range = ranges; range; range = range->next)
        if (range->kind != RANGE_RESERVED && overlaps(range, address, 1))
            return range;
    return NULL;
}

static void unmap(const Range *range)
{
    void *start = (void *)range->address;
    if (range->kind == RANGE_VMM) /* the addresses stay reserved */
        mmap(start, range->size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    else if (range->kind != RANGE_REGISTERED)
        munmap(start, range->size);
}

void remove_range(Range *range)
{
    Range **place = &ranges;
    while (*place != range)
        place = &(*place)->next;
    *place = range->next;
    unmap(range);
    if (range->block) {
        if (range->kind == RANGE_PLAIN) /* its address is the handle, too */
            release_handle(range->block);
        release_mapping(range->block);
    }
    free(range);
}

void remove_ranges_of(CUcontext context)
{
    for (Range *range = ranges, *next; range; range = next) {
        next = range->next;
        if (range->context == context)
            remove_range(range);
    }
}

/* What a device may do with what is mapped there. Copies of cuMemAlloc's memory need no access: the driver sees to it. */
int access_of(const Range *range, CUdevice device)
{
    return range->kind == RANGE_VMM ? range->access[device] : ACCESS_READ_WRITE;
}

/* Whether device memory is mapped everywhere from `address` on. Neighbours count as one. */
bool is_device_memory(CUdeviceptr address, size_t size)
{
    return is_accessible(address, size, 0, ACCESS_NONE);
}

/* Whether a device has at least this access to all of it. */
bool is_accessible(CUdeviceptr address, size_t size, CUdevice device, int access)
{
    CUdeviceptr end = address + size;
    if (end < address)
        return false;
    while (address < end) {
        const Range *range = range_around(address);
        if (!range || !range->block || (access_of(range, device) & access) != access)
            return false;
        address = range->address + range->size;
    }
    return true;
}

/* Whether it is memory of cuMemHostAlloc or cuMemHostRegister, all of it. */
bool is_pinned(const void *address, size_t size)
{
    const Range *range = range_around((CUdeviceptr)address);
    return range && (range->kind == RANGE_HOST || range->kind == RANGE_REGISTERED) &&
           (CUdeviceptr)address + size <= range->address + range->size;
}
