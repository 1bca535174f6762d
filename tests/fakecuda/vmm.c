/* Virtual memory management: allocations, address ranges, mappings, access, export and import. No context is needed. */
#define _GNU_SOURCE
#include "fakecuda.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

/* -- allocations -------------------------------------------------------------------------------------------------- */

static int gpu_of_properties(const CUmemAllocationProp *properties)
{
    return properties ? gpu_of(properties->location.id) : NO_GPU;
}

API CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *properties, int option)
{
    ENTER_ON(gpu_of_properties(properties), HEALTHY);
    (void)option;
    if (properties->type != ALLOCATION_PINNED || properties->location.type != LOCATION_DEVICE)
        return INVALID_VALUE;
    if (!is_device(properties->location.id))
        return INVALID_DEVICE;
    *bytes = process.granularity;
    return SUCCESS;
}

/* Handle types must be asked for here; an allocation cannot be exported otherwise. The memory reads as zero. */
API CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *properties,
                         uint64_t flags)
{
    ENTER_ON(gpu_of_properties(properties), HEALTHY);
    int types = properties->requested_handle_types;
    if (!size || size % process.granularity || flags || properties->type != ALLOCATION_PINNED ||
        properties->location.type != LOCATION_DEVICE)
        return INVALID_VALUE;
    if (!is_device(properties->location.id))
        return INVALID_DEVICE;
    if ((types & ~HANDLE_POSIX_FD) || (types && setting("FAKECUDA_NO_EXPORT", 0)))
        return NOT_SUPPORTED;
    Block *block;
    CUresult code = new_block(&block, BLOCK_VMM, properties->location.id, types, size);
    if (!code)
        *handle = block->identity;
    return code;
}

/* The memory stays while it is mapped, or while anybody holds a descriptor of it. */
API CUresult cuMemRelease(CUmemGenericAllocationHandle handle)
{
    ENTER_ON(gpu_of_handle(handle), HEALTHY);
    Block *block = find_block(handle);
    if (!block)
        return INVALID_VALUE;
    release_handle(block);
    return SUCCESS;
}

API CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *properties,
                                                    CUmemGenericAllocationHandle handle)
{
    ENTER_ON(gpu_of_handle(handle), HEALTHY);
    const Block *block = find_block(handle);
    if (!block)
        return INVALID_VALUE;
    *properties = (CUmemAllocationProp){.type = ALLOCATION_PINNED,
                                        .requested_handle_types = block->handle_types,
                                        .location = {LOCATION_DEVICE, block->device}};
    return SUCCESS;
}

API CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *handle, void *address)
{
    ENTER(HEALTHY);
    Range *range = range_around((CUdeviceptr)address);
    if (!range || range->kind != RANGE_VMM)
        return INVALID_VALUE;
    if (!range->block->handles) /* the descriptor is closed by then: see release_handle */
        return NOT_SUPPORTED;
    range->block->handles++;
    *handle = range->block->identity;
    return SUCCESS;
}

/* -- export and import -------------------------------------------------------------------------------------------- */

API CUresult cuMemExportToShareableHandle(void *shareable, CUmemGenericAllocationHandle handle, int type,
                                          uint64_t flags)
{
    ENTER_ON(gpu_of_handle(handle), HEALTHY);
    const Block *block = find_block(handle);
    if (!block || flags)
        return INVALID_VALUE;
    if (type != HANDLE_POSIX_FD || setting("FAKECUDA_NO_EXPORT", 0))
        return NOT_SUPPORTED;
    if (!(block->handle_types & HANDLE_POSIX_FD))
        return INVALID_VALUE;
    int fd = fcntl(block->fd, F_DUPFD_CLOEXEC, 3);
    if (fd < 0)
        return OUT_OF_MEMORY;
    *(int *)shareable = fd;
    return SUCCESS;
}

/* Whoever has the descriptor may import, more than once. The descriptor stays the caller's. */
API CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *shareable, int type)
{
    ENTER(HEALTHY);
    if (type != HANDLE_POSIX_FD)
        return NOT_SUPPORTED;
    int fd = fcntl((int)(intptr_t)shareable, F_DUPFD_CLOEXEC, 3);
    if (fd < 0)
        return INVALID_VALUE;
    Block *block;
    CUresult code = adopt_block(&block, fd);
    if (code)
        return code;
    if (block->kind != BLOCK_VMM || !is_first_hand(fd)) {
        release_handle(block);
        return INVALID_VALUE;
    }
    *handle = block->identity;
    return SUCCESS;
}

/* -- address ranges ----------------------------------------------------------------------------------------------- */

/* The hint is not followed; the real driver may not, either. */
API CUresult cuMemAddressReserve(CUdeviceptr *address, size_t size, size_t alignment, CUdeviceptr hint,
                                 uint64_t flags)
{
    ENTER(HEALTHY);
    (void)hint;
    if (!size || size % PAGE || (alignment & (alignment - 1)) || flags)
        return INVALID_VALUE;
    if (alignment < process.granularity)
        alignment = process.granularity;
    char *start = mmap(NULL, size + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED)
        return OUT_OF_MEMORY;
    size_t before = -(uintptr_t)start % alignment;
    if (before)
        munmap(start, before);
    munmap(start + before + size, alignment - before);
    *address = (CUdeviceptr)(start + before);
    add_range((Range){.kind = RANGE_RESERVED, .address = *address, .size = size});
    return SUCCESS;
}

API CUresult cuMemAddressFree(CUdeviceptr address, size_t size)
{
    ENTER(HEALTHY);
    Range *reserved = find_range(RANGE_RESERVED, address);
    if (!reserved || reserved->size != size)
        return INVALID_VALUE;
    for (const Range *range = ranges; range; range = range->next)
        if (range->kind == RANGE_VMM && overlaps(range, address, size))
            return INVALID_VALUE;
    remove_range(reserved);
    return SUCCESS;
}

static bool is_reserved_and_free(CUdeviceptr address, size_t size)
{
    bool reserved = false;
    for (const Range *range = ranges; range; range = range->next) {
        if (range->kind == RANGE_VMM && overlaps(range, address, size))
            return false;
        if (range->kind == RANGE_RESERVED && address >= range->address &&
            address + size <= range->address + range->size)
            reserved = true;
    }
    return reserved;
}

/* The offset must be 0, so a mapping starts where the allocation does. It is inaccessible until cuMemSetAccess. */
API CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                      uint64_t flags)
{
    ENTER_ON(gpu_of_handle(handle), HEALTHY);
    Block *block = find_block(handle);
    if (!block || offset || flags || address % process.granularity || !size || size % process.granularity ||
        size > block->size || !is_reserved_and_free(address, size))
        return INVALID_VALUE;
    REFUSED_BY(while_others_capture());
    if (mmap((void *)address, size, PROT_NONE, MAP_SHARED | MAP_FIXED, block->fd, 0) == MAP_FAILED)
        return OUT_OF_MEMORY;
    add_range((Range){.kind = RANGE_VMM, .address = address, .size = size, .block = block});
    return SUCCESS;
}

/* Work of a stream that still uses the mapping is not waited for: it ends in an illegal address. */
API CUresult cuMemUnmap(CUdeviceptr address, size_t size)
{
    ENTER(HEALTHY);
    Range *range = find_range(RANGE_VMM, address);
    if (!range || range->size != size)
        return INVALID_VALUE;
    REFUSED_BY(while_others_capture());
    remove_range(range);
    return SUCCESS;
}

static CUresult check_access(const CUmemAccessDesc *wanted, const Range *range)
{
    if (wanted->location.type != LOCATION_DEVICE ||
        (wanted->flags != ACCESS_NONE && wanted->flags != ACCESS_READ && wanted->flags != ACCESS_READ_WRITE))
        return INVALID_VALUE;
    if (!is_device(wanted->location.id) || !can_reach(wanted->location.id, range->block->device))
        return INVALID_DEVICE;
    return SUCCESS;
}

/* The processor stands for kernels of every device, so it may do what any of them may. */
static void protect(const Range *range)
{
    int access = ACCESS_NONE;
    for (CUdevice device = 0; device < process.device_count; device++)
        access |= range->access[device];
    int protection = access == ACCESS_NONE ? PROT_NONE : access == ACCESS_READ ? PROT_READ : PROT_READ | PROT_WRITE;
    mprotect((void *)range->address, range->size, protection);
}

/* For one or several whole mappings that fill the range, and for the devices that are named; access of others stays as
 * it is. Nothing keeps an importer from asking for write access. */
API CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc *descriptions, size_t count)
{
    ENTER_ON(count ? gpu_of(descriptions[0].location.id) : NO_GPU, HEALTHY);
    if (!count)
        return INVALID_VALUE;
    size_t filled = 0;
    for (const Range *range = ranges; range; range = range->next)
        if (range->kind == RANGE_VMM && range->address >= address && range->address + range->size <= address + size) {
            filled += range->size;
            for (size_t i = 0; i < count; i++) {
                CUresult code = check_access(&descriptions[i], range);
                if (code)
                    return code;
            }
        }
    if (!size || filled != size)
        return INVALID_VALUE;
    REFUSED_BY(while_others_capture());
    for (Range *range = ranges; range; range = range->next)
        if (range->kind == RANGE_VMM && overlaps(range, address, size)) {
            for (size_t i = 0; i < count; i++)
                range->access[descriptions[i].location.id] = descriptions[i].flags;
            protect(range);
        }
    return SUCCESS;
}

API CUresult cuMemGetAccess(uint64_t *flags, const CUmemLocation *location, CUdeviceptr address)
{
    ENTER_ON(location ? gpu_of(location->id) : NO_GPU, HEALTHY);
    const Range *range = range_around(address);
    if (!range || range->kind != RANGE_VMM || location->type != LOCATION_DEVICE || !is_device(location->id))
        return INVALID_VALUE;
    *flags = (uint64_t)range->access[location->id];
    return SUCCESS;
}
